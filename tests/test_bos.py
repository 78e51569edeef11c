"""Which special tokens stand around a text: as the tokenizer itself says, or as the caller says."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError
from interp.prompts.special_tokens import SpecialTokens

TEXT = "w1 w2 w3 w2"
PAIR = interp.PromptPair("w1 w2 w3", "w1 w4 w3", "w5", "w6")


def tokenizer(template: str | None, **names: str) -> PreTrainedTokenizerFast:
    """Words w0 … w95; ``template`` is what the tokenizer puts around a text, ``names`` its special tokens."""
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(96))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [(t, vocab[t]) for t in template.split() if t in vocab]
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **names)


ADDS = ("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"})
HAS = (None, {"bos_token": "<s>", "eos_token": "</s>"})
NONE = (None, {"eos_token": "</s>"})


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "neox"])
@pytest.mark.parametrize("kind", [ADDS, HAS, NONE, ("<s> $A </s>", ADDS[1])])
def test_the_tokenizer_decides(family: str, kind) -> None:
    """Token for token what it returns, closing tokens aside; logits are those of the untouched model on these."""
    made = tokenizer(kind[0], **kind[1])
    before = made.backend_tokenizer.to_str(), dict(made.init_kwargs), made.special_tokens_map
    hf = tiny_hf(family)
    ids = [i for i in made(TEXT)["input_ids"] if i != 1]
    with torch.no_grad():
        want = hf(torch.tensor([ids])).logits[0, -1]
    model = interp.load(copy.deepcopy(hf), tokenizer=made)
    assert model.coder.encode(TEXT) == ids == model.bridge.to_tokens(TEXT)[0].tolist()
    assert torch.allclose(model.next_token_logits([model.coder.encode(TEXT)])[0].double(), want.double(), atol=1e-5)
    assert model.coder.offsets(TEXT)[-1] == (9, 11) and len(model.coder.offsets(TEXT)) == len(ids)
    assert model.provenance()["bos"] is (None if kind is NONE else ids[0] == 0)
    assert model.tokenizer is made
    assert before == (made.backend_tokenizer.to_str(), dict(made.init_kwargs), made.special_tokens_map)


@pytest.mark.parametrize("kind", [ADDS, HAS])
def test_the_caller_decides(kind) -> None:
    words = [5, 6, 7, 6]
    for bos, ids in ((True, [0, *words]), (False, words)):
        model = interp.load(tiny_hf("qwen2"), tokenizer=tokenizer(kind[0], **kind[1]), bos=bos)
        assert model.coder.encode(TEXT) == ids == model.bridge.to_tokens(TEXT)[0].tolist()
        assert model.coder.encode(f"<s> {TEXT}") == [0, *words]  # a text's own is neither doubled nor taken away
        effects = interp.patch(model, PAIR, model.sites("z", layers=0, heads=0))
        assert effects.provenance["bos"] is bos and model.attention_stats(TEXT).provenance["bos"] is bos
        assert model.special_tokens.has_bos is bos


def test_a_tokenizer_without_bos_has_none_to_put_in_front() -> None:
    with pytest.raises(ModelError, match=r"bos=True: the tokenizer of .* has no BOS token"):
        interp.load(tiny_hf("llama"), tokenizer=tokenizer(*NONE[:1], **NONE[1]), bos=True)
    with pytest.raises(ModelError, match="bos='yes': 'tokenizer'"):
        interp.load(tiny_hf("llama"), tokenizer=tokenizer(*NONE[:1], **NONE[1]), bos="yes")  # type: ignore[arg-type]
    assert SpecialTokens.of(None) == SpecialTokens()


def test_the_hash_of_prompts_knows_their_tokens() -> None:
    """Equal texts, read with and without BOS, are two sets of prompts; equal tokens are one."""
    hashes = {}
    for name, bos in (("with", True), ("without", False), ("again", True)):
        model = interp.load(tiny_hf("llama"), tokenizer=tokenizer(None, **HAS[1]), bos=bos)
        tables = (
            interp.patch(model, PAIR, "z.L0H0"), model.attention_stats(TEXT), model.attention_patterns(TEXT),
            interp.circuits.attribute_edges(model, PAIR),
        )  # fmt: skip
        hashes[name] = [t.provenance["prompts"] for t in tables]
        reference = interp.ablate(model, PAIR, "z.L0H0", using="mean", reference=[TEXT]).provenance["reference"]
        hashes[name].append(reference)
    assert hashes["with"] == hashes["again"]
    assert not set(hashes["with"]) & set(hashes["without"])


def test_prompts_as_token_ids_say_for_themselves_whether_bos_stands_in_front() -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=tokenizer(*ADDS[:1], **ADDS[1]))
    for ids, bos in (([5, 6], False), ([0, 5, 6], True), ([[0, 5], [5, 6]], "of some prompts")):
        assert model.attention_stats(ids).provenance["bos"] == bos


def test_a_bridge_stays_as_it_is_unless_asked() -> None:
    from interp.model.loading import boot

    for kind in (ADDS, HAS):
        for prepends in (True, False):
            bridge = boot(tiny_hf("llama"), tokenizer=tokenizer(kind[0], **kind[1])).bridge
            bridge.cfg.default_prepend_bos = prepends
            want = bridge.to_tokens(TEXT)[0].tolist()
            assert want == ([0] if prepends else []) + [5, 6, 7, 6]
            model = interp.load(bridge)
            assert model.coder.encode(TEXT) == want == bridge.to_tokens(TEXT)[0].tolist()
    model = interp.load(boot(tiny_hf("llama"), tokenizer=tokenizer(None, **HAS[1])).bridge, bos=True)
    assert model.coder.encode(TEXT)[0] == 0
    assert interp.load(model) is interp.load(model, bos=True) is model
    with pytest.raises(ModelError, match="loaded already"):
        interp.load(model, bos=False)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_an_encoder_reads_its_closing_token(family: str) -> None:
    """RoBERTa's </s> and BERT's [SEP] are part of what a bidirectional model reads."""
    made = tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
                     mask_token="<mask>", pad_token="<unk>")  # fmt: skip
    hf = tiny_hf(family)
    ids = made("w1 <mask> w3")["input_ids"]
    with torch.no_grad():
        want = hf(torch.tensor([ids])).logits[0, ids.index(3)]
    model = interp.load(hf, tokenizer=made)
    assert model.coder.encode("w1 <mask> w3") == ids == [0, 5, 3, 7, 1]
    assert model.bridge.to_tokens("w1 <mask> w3")[0].tolist() == ids
    assert torch.allclose(model.next_token_logits([ids])[0].double(), want.double(), atol=1e-5)
    direction = interp.mean_difference(model, ["w1 <mask>"], ["<mask> w4"], "resid_post.L0")
    acts = [hf_states(model, text)[1:-1].mean(0) for text in ("w1 <mask>", "<mask> w4")]
    assert torch.allclose(direction, acts[0] - acts[1], atol=1e-6)  # special tokens are left out of the mean


def hf_states(model: interp.Model, text: str) -> torch.Tensor:
    """The residual stream that leaves the first block, by a hook on the Hugging Face layer."""
    seen: list[torch.Tensor] = []
    layer = next(m for n, m in model.bridge.original_model.named_modules() if n.endswith("layer.0"))
    handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model.bridge.original_model(torch.tensor([model.tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_the_doctor_says_what_stands_around_a_text() -> None:
    from interp.doctor.examination import examine

    examination = examine(tiny_hf("llama"), tokenizer=tokenizer(*ADDS[:1], **ADDS[1]), bos=False)
    (finding,) = (f for f in examination.findings if f.item == "special tokens")
    assert finding.value == "nothing before a text, nothing after it (bos=False)"


@pytest.mark.model
def test_the_embedded_model_gets_bos_unless_its_tokenizer_decides(smollm2) -> None:
    assert smollm2.provenance()["bos"] is True and smollm2.special_tokens.before == (1,)
    model = interp.load("smollm2", bos="tokenizer")
    assert model.coder.encode("The capital of France is") == smollm2.coder.encode("The capital of France is")[1:]
    assert model.provenance()["bos"] is False


def test_a_sweep_and_the_command_line_take_bos(tmp_path) -> None:
    from interp.cli.options import RunOptions, bos_policy
    from interp.errors import InterpError
    from interp.sweep.config import parse

    document = {
        "version": 1, "name": "x", "models": [{"load": "smollm2", "bos": False}], "tasks": [{"task": "ioi", "n": 2}],
        "recipes": [{"recipe": "patch", "sites": ["z"]}], "sites": [{"sites": "z"}],
    }  # fmt: skip
    assert parse(document).models[0].options == {"bos": False}
    document["models"][0]["bos"] = "maybe"
    with pytest.raises(InterpError, match='true, false or "tokenizer" expected'):
        parse(document)
    assert [bos_policy(word) for word in (None, "tokenizer", "True", "false")] == [None, "tokenizer", True, False]
    with pytest.raises(InterpError, match="--bos yes: one of tokenizer, true, false expected"):
        RunOptions(bos="yes").check()


def test_a_text_without_tokens_is_refused_everywhere() -> None:
    """Without BOS, a tokenizer may make nothing of a text."""
    model = interp.load(tiny_hf("llama"), tokenizer=tokenizer(None, **HAS[1]), bos=False)
    for call in (
        lambda: model.attention_stats(["w1", "  "]),
        lambda: model.attention_patterns(" \n"),
        lambda: interp.patch(model, interp.PromptPair(" ", "  ", "w5", "w6"), "z.L0H0"),
        lambda: interp.ablate(model, PAIR, "z.L0H0", using="mean", reference=["  ", "w1"]),
        lambda: interp.mean_difference(model, [" "], ["w1"], "resid_post.L0"),
        lambda: interp.circuits.attribute_edges(model, interp.PromptPair(" ", "  ", "w5", "w6")),
        lambda: model.next_token_logits([[]]),
    ):
        with pytest.raises(interp.InterpError, match=r"makes no token of this prompt|without tokens"):
            call()
    model = interp.load(tiny_hf("llama"), tokenizer=tokenizer(None, **HAS[1]), bos=True)
    assert len(model.attention_stats("  ")) == 1
