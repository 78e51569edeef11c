"""Named spans of chats, sentences and images: the public address of `interp.prompts.spans`."""

from interp.prompts.spans import chat_pair, chat_prompt, image_spans, sentence_spans, with_sentences

__all__ = ["chat_pair", "chat_prompt", "image_spans", "sentence_spans", "with_sentences"]
