"""Named spans, and the alignment of tokens with text, for word, byte-level and byte-fallback vocabularies."""

from __future__ import annotations

import copy

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import interp
from interp.errors import PromptError
from interp.prompts.pairs import Prompt, PromptPair
from interp.prompts.spans import chat_pair, chat_prompt, image_spans, sentence_spans, with_sentences
from interp.prompts.token_bytes import byte_alphabet, label, offsets_by_bytes, token_bytes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE with few merges, made in memory: most characters beyond ASCII are split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1} | {c: i for i, c in enumerate(sorted(byte_alphabet()), 2)}
    raw = Tokenizer(models.BPE({**vocab, "he": len(vocab), "ð\x9f".replace("\x9f", "Ł"): len(vocab) + 1},
                               [("h", "e"), ("ð", "Ł")]))  # fmt: skip
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model(byte_level):
    from transformers import LlamaForCausalLM

    from interp.doctor.families.text import config

    small = config("llama")
    small.vocab_size, small.max_position_embeddings = len(byte_level), 256
    return interp.load(LlamaForCausalLM(small).eval(), tokenizer=byte_level, bos=True)


def check_alignment(text: str, coder, tokenizer) -> None:
    """Tokens spell the text; each lies inside its range; together the ranges cover all but white space."""
    ids, ranges = coder.encode(text), coder.offsets(text)
    assert len(ids) == len(ranges) == len(coder.texts(ids))
    pairs = [(i, r) for i, r in zip(ids, ranges, strict=True) if r != (0, 0)]
    assert b"".join(token_bytes(tokenizer, i) for i, _ in pairs) == text.encode()
    covered: set[int] = set()
    for i, (a, b) in pairs:
        assert 0 <= a <= b <= len(text)
        assert token_bytes(tokenizer, i).strip() in text[a:b].encode() or not token_bytes(tokenizer, i).strip()
        covered |= set(range(a, b))
    assert all(c in covered or c_is_space(text[c]) for c in range(len(text)))


def c_is_space(character: str) -> bool:
    return character.isspace() or not character.strip()


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_byte_level_tokens_align_with_the_text(model, byte_level, text: str) -> None:
    check_alignment(text, model.coder, byte_level)


@pytest.mark.model
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF), min_size=1, max_size=30))
def test_the_embedded_tokenizer_aligns_with_the_text(smollm2, text: str) -> None:
    bare = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
    assume(smollm2.tokenizer.decode(bare, clean_up_tokenization_spaces=False) == text)  # it drops bytes it never saw
    check_alignment(text, smollm2.coder, smollm2.tokenizer)


def test_split_characters_show_their_bytes_and_keep_their_range(model, byte_level) -> None:
    text = "he 😀é"
    ids = model.coder.encode(text)
    assert model.coder.texts(ids) == ["<s>", "he", " ", "\\xf0\\x9f", "\\x98", "\\x80", "\\xc3", "\\xa9"]
    assert model.coder.offsets(text)[3:] == [(3, 4)] * 3 + [(4, 5)] * 2
    pair = PromptPair(text, "he 😁é", "h").span("face", "😀")
    assert Prompt(text).span("face", "😀").token_spans(model.coder) == {"face": (3, 6)}
    assert interp.prompts.encode_pairs(pair, model.coder)[0].spans == {"face": (3, 6)}


def test_byte_fallback_and_lost_text() -> None:
    class SentencePiece:
        all_special_ids = ()
        names = ("<0xF0>", "▁a")

        def decode(self, ids, **_):
            return "\ufffd" if ids == [0] else " a"

        def convert_ids_to_tokens(self, i):
            return self.names[i]

    assert token_bytes(SentencePiece(), 0) == b"\xf0" and label(SentencePiece(), 0) == "\\xf0"
    assert label(SentencePiece(), 1) == " a"
    assert offsets_by_bytes("aé", [b"a\xc3", b"\xa9"]) == [(0, 2), (1, 2)]
    assert offsets_by_bytes("Aé", [b"a\xc3", b"\xa9"]) is None


# ------------------------------------------------------------------ chats

CHAT = [
    {"role": "system", "content": "Be short. "},
    {"role": "user", "content": "he?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "he?"},
]


def test_messages_become_spans_by_their_role(model, byte_level) -> None:
    prompt = chat_prompt(byte_level, CHAT)
    words = {name: prompt.text[a:b] for name, (a, b) in prompt.spans.items()}
    assert words == {"system": "Be short.", "user_1": "he?", "assistant": "Yes", "user_2": "he?"}
    assert prompt.spans["user_1"][1] <= prompt.spans["assistant"][0] < prompt.spans["user_2"][0]
    assert prompt.text.endswith("<s>assistant\n") and not chat_prompt(byte_level, CHAT, answering=False).text.endswith(
        "t\n"
    )
    ids = model.coder.encode(prompt.text)
    assert ids[0] == 0 != ids[1], "the template's own <s> is not doubled"
    start, stop = prompt.token_spans(model.coder)["assistant"]
    assert "".join(model.coder.texts(ids[start:stop])) == "Yes"
    assert len(model.attention_stats([prompt]).tokens[0]) == len(ids)


def test_a_pair_of_chats_can_be_patched_at_a_message(model, byte_level) -> None:
    other = [*CHAT[:3], {"role": "user", "content": "eh?"}]
    with pytest.raises(PromptError, match="different lengths"):
        interp.patch(model, chat_pair(byte_level, CHAT, other, "x", "y"), model.sites("resid_pre", positions="user_2"))
    other = [*CHAT[:3], {"role": "user", "content": "he!"}]
    pair = chat_pair(byte_level, CHAT, other, "x", "y")
    effects = interp.patch(model, pair, model.sites("resid_pre", layers=0, positions="user_2"))
    assert abs(effects.frame()["effect"].iloc[0] - 1) < 1e-3  # all that differs is in that message


@pytest.mark.parametrize("words", ["I", "a", "user", "AI", "assistant", "s", "</s>", "You are AI", "system\nuser"])
def test_a_message_is_found_where_it_was_put(byte_level, words: str) -> None:
    """Not where the template, or another message, has the same letters; offsets by arithmetic on the template."""
    made = copy.copy(byte_level)
    preamble = "You are an AI. I am a user.\n"
    made.chat_template = preamble + TEMPLATE
    chat = [{"role": r, "content": f" {words}"} for r in ("system", "user", "assistant", "user")]
    prompt = chat_prompt(made, chat)
    at, expected = len(preamble), {}
    for name, role in (("system",) * 2, ("user_1", "user"), ("assistant",) * 2, ("user_2", "user")):
        start = at + len(f"<s>{role}\n")
        expected[name] = (start, start + len(words))
        at = start + len(f"{words}</s>\n")
    assert prompt.spans == expected and prompt.text[at:] == "<s>assistant\n"


def test_templates_that_look_at_their_messages(byte_level) -> None:
    made = copy.copy(byte_level)
    made.chat_template = (
        "{% for m in messages %}[{% if 'why' in m['content'] %}? {% endif %}{{ m['content'] }}]{% endfor %}"
    )
    prompt = chat_prompt(made, [{"role": "user", "content": "why me"}, {"role": "assistant", "content": "?"}])
    assert prompt.text == "[? why me][?]" and prompt.spans == {"user": (3, 9), "assistant": (11, 12)}
    for template, content in (
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "why"),  # rewritten
        ("{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}", "why"),  # repeated
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "user"),  # dropped
    ):
        made.chat_template = template
        with pytest.raises(PromptError, match="does not show the user message"):
            chat_prompt(made, [{"role": "user", "content": content}])
    made.chat_template = "{{ raise_exception('no system message here') }}"
    with pytest.raises(PromptError, match="no system message here"):
        chat_prompt(made, [{"role": "system", "content": "x"}])
    with pytest.raises(PromptError, match="'content': a text"):
        chat_prompt(made, [{"role": "user", "content": [{"type": "text", "text": "x"}]}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [([], "at least one message"), (["hello"], "a message is"), ([{"role": "user", "content": " "}], "does not show")],
)
def test_chats_that_cannot_be_written_are_refused(byte_level, messages, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        chat_prompt(byte_level, messages)


@pytest.mark.model
def test_the_embedded_models_chat(smollm2) -> None:
    prompt = chat_prompt(smollm2.tokenizer, CHAT[:2])
    ids = smollm2.coder.encode(prompt.text)
    assert ids.count(smollm2.tokenizer.bos_token_id) == 3  # system, user and the assistant's turn; none in front
    start, stop = prompt.token_spans(smollm2.coder)["user"]
    assert smollm2.tokenizer.decode(ids[start:stop]) == "he?"


# ------------------------------------------------------------------ sentences and images


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        (
            "Dr. J. Smith paid 3.14 dollars, e.g. in cash. Why?",
            ["Dr. J. Smith paid 3.14 dollars, e.g. in cash.", "Why?"],
        ),
        ('He said "no." Then left…\nA title\n\nThe end', ['He said "no."', "Then left…", "A title", "The end"]),
        ("1. First. 2. Second.", ["1. First.", "2. Second."]),
        ("东京。大阪！", ["东京。", "大阪！"]),
        ("  no end ", ["no end"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    spans = sentence_spans(text)
    assert [text[a:b] for a, b in spans.values()] == sentences
    assert list(spans) == [f"sentence_{i + 1}" for i in range(len(sentences))]
    assert with_sentences(Prompt(text)).spans == with_sentences(PromptPair(text, text, "x")).spans == spans


@given(TEXT)
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    kept = "".join(text[a:b] for a, b in sentence_spans(text).values())
    assert "".join(kept.split()) == "".join(text.split())


def test_images_are_runs_of_their_token() -> None:
    assert image_spans([1, 9, 9, 9, 2], 9) == {"image": (1, 4)}
    assert image_spans([9, 1, 9, 9], 9) == {"image_1": (0, 1), "image_2": (2, 4)}
    with pytest.raises(PromptError, match="was the image given"):
        image_spans([1, 2], 9)
