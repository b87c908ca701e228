"""The language model: packing, generation and its probabilities, against the plain forward pass."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import LanguageBackbone, Model, Sampling
from bestiary.shared.language.causal_lm import CausalLM, read_prompts
from bestiary.shared.language.generate import sampling_logprobs
from bestiary.shared.language.hf_causal_lm import HFCausalLM, packed_mask

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform, so that an error shows
}


def backbone(**changes):
    torch.manual_seed(0)
    return HFCausalLM("llama", {**CONFIG, **changes})


@pytest.fixture(scope="module")
def model():
    return CausalLM(backbone(), max_new_tokens=12).eval()


def test_it_fits_the_protocols(model):
    assert isinstance(model, Model)
    assert isinstance(model.backbone, LanguageBackbone)
    assert {c.__name__ for c in model.wrap_policy()} == {"LlamaDecoderLayer"}


def forward(model, ids, **options):
    """Logits (T, V) of one plain row."""
    with torch.no_grad():
        return model.backbone(model.backbone.embed(torch.tensor([ids])), **options)[0][0]


# ------------------------------------------------------------------ packing


def test_packed_rows_equal_separate_ones():
    lm = backbone().float()
    torch.manual_seed(1)
    parts = [torch.randint(0, 256, (1, n)) for n in (5, 1, 9)]
    labels = [p.clone() for p in parts]

    def loss(logits, ids):
        return F.cross_entropy(logits[:-1], ids[1:], reduction="sum") if len(ids) > 1 else logits.sum() * 0

    separate = [lm(lm.embed(p))[0][0] for p in parts]
    sum(loss(s, lab[0]) for s, lab in zip(separate, labels, strict=True)).backward()
    expected = {n: p.grad.clone() for n, p in lm.named_parameters()}
    lm.zero_grad()

    row = torch.cat([*parts, torch.full((1, 3), lm.tokenizer.pad_id)], 1)
    seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 9 + [3] * 3], dtype=torch.int32)
    position = torch.cat([torch.arange(n) for n in (5, 1, 9, 3)])[None]
    mask = torch.tensor([[1] * 15 + [0] * 3])
    logits = lm(lm.embed(row), mask, position, seq_idx)[0][0]
    packed = logits[:15].split((5, 1, 9))
    for one, other in zip(packed, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    sum(loss(s, lab[0]) for s, lab in zip(packed, labels, strict=True)).backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.isfinite(logits).all()


def test_packed_mask_by_hand():
    seen = packed_mask(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 0]]), torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_packing_and_a_cache_exclude_each_other():
    lm = backbone()
    with pytest.raises(ValueError, match="exclude"):
        lm(lm.embed(torch.zeros(1, 2, dtype=torch.long)), seq_idx=torch.zeros(1, 2), cache=lm.new_cache(1))


def test_right_padding_does_not_change_a_row(model):
    examples = [{"id": "a", "text": "hello there"}, {"id": "b", "text": "hi"}]
    batch = model.processor()(examples, "train")
    with torch.no_grad():
        logits = model(batch).logits
    ids = [*b"hi", 257]
    torch.testing.assert_close(logits[1, :3], forward(model, ids), rtol=1e-5, atol=1e-5)


def test_added_tokens_grow_the_embedding():
    lm = backbone()
    before = lm.embed(torch.arange(262)).detach().clone()
    assert lm.add_tokens(["<image>", "<pad>"]) == [262, 256]
    assert lm(lm.embed(torch.tensor([[262, 1]])))[0].shape == (1, 2, 263)
    assert torch.equal(lm.embed(torch.arange(262)), before)


def test_unknown_names():
    with pytest.raises(ConfigError, match="'lama'"):
        HFCausalLM("lama", CONFIG)
    with pytest.raises(ConfigError, match="there is: byte"):
        HFCausalLM("llama", CONFIG, tokenizer="bpe")


# ------------------------------------------------------------------ generation

PROMPTS = ["say apple", "upper x", "a"]


def prompts(model, texts=PROMPTS, names=None):
    return model.processor()(
        [
            {"id": n, "messages": [text_message("user", t)]}
            for t, n in zip(texts, names or [f"p{t}" for t in texts], strict=True)
        ],
        "prompt",
    )


def plain_ids(text):
    return [259, *text.encode(), 257, 258 + 2]


def test_greedy_is_the_argmax_of_the_whole_forward_pass(model):
    rollout = model.generate(prompts(model))
    for row, text in enumerate(PROMPTS):
        ids = plain_ids(text)
        for step in range(12):
            logits = forward(model, ids)[-1]
            if not rollout.mask[row, step]:
                break
            top = logits.topk(2).values
            assert top[0] - top[1] > 1e-3  # no tie to be decided by rounding
            assert rollout.completion_ids[row, step] == logits.argmax()
            expected = torch.log_softmax(logits, -1).max()
            assert rollout.logprobs[row, step].item() == pytest.approx(expected.item(), abs=1e-4)
            ids.append(int(logits.argmax()))
        assert rollout.texts[row] == bytes(i for i in ids[len(plain_ids(text)) :] if i < 256).decode(errors="replace")


@pytest.mark.parametrize("sampling", [None, Sampling(8, temperature=1.0, seed=3), Sampling(8, 0.7, 0.8, 1)])
def test_a_prompt_is_completed_the_same_in_any_company(model, sampling):
    together = model.generate(prompts(model), 2, sampling)
    for row, text in enumerate(PROMPTS):
        alone = model.generate(prompts(model, [text]), 2, sampling)
        length = alone.completion_ids.shape[1]
        for sample in range(2):
            at = 2 * row + sample
            assert torch.equal(together.completion_ids[at, :length], alone.completion_ids[sample])
            assert torch.equal(together.mask[at, :length], alone.mask[sample])
            torch.testing.assert_close(together.logprobs[at, :length], alone.logprobs[sample], rtol=1e-4, atol=1e-4)
            assert together.texts[at] == alone.texts[sample]
            assert not together.mask[at, length:].any()


def test_noise_depends_on_seed_name_sample_and_token(model):
    def draw(seed=0, names=("a", "b", "c"), n=2):
        return model.generate(prompts(model, names=list(names)), n, Sampling(8, 1.0, seed=seed)).completion_ids

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=1))
    assert not torch.equal(draw(), draw(names=("x", "y", "z")))
    both = draw()
    assert not torch.equal(both[0], both[1])
    # More samples do not change the first ones.
    more = draw(n=3)
    assert torch.equal(more[0, :8], both[0])
    assert torch.equal(more[1, :8], both[1])


def test_samples_follow_the_distribution(model):
    """First tokens of many samples against the softmax: a chi-square over the likely tokens."""
    n = 600
    first = model.generate(prompts(model, ["a"]), n, Sampling(1, temperature=1.5)).completion_ids[:, 0]
    p = torch.softmax(forward(model, plain_ids("a"))[-1] / 1.5, -1)
    likely = (p * n > 5).nonzero()[:, 0]
    assert len(likely) > 3
    counts = torch.bincount(first, minlength=262)[likely]
    rest = n - counts.sum()
    chi2 = ((counts - n * p[likely]) ** 2 / (n * p[likely])).sum() + (rest - n * (1 - p[likely].sum())) ** 2 / (
        n * (1 - p[likely].sum())
    )
    freedom = len(likely)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [Sampling(6, 0.8, 0.7, 2), Sampling(6, 1.3), Sampling(6)])
def test_logprobs_are_those_of_what_was_sampled_from(model, sampling):
    rollout = model.generate(prompts(model), 2, sampling)
    for row in range(6):
        ids = plain_ids(PROMPTS[row // 2])
        for step in range(int(rollout.mask[row].sum())):
            logits = forward(model, ids)[-1] / (sampling.temperature or 1.0)
            p = torch.softmax(logits, -1)
            if sampling.top_p < 1:
                order = p.argsort(descending=True)
                kept = order[: int((p[order].cumsum(0) < sampling.top_p).sum()) + 1]
                cut = torch.zeros_like(p)
                cut[kept] = p[kept]
                p = cut / cut.sum()
            token = int(rollout.completion_ids[row, step])
            assert rollout.logprobs[row, step].item() == pytest.approx(math.log(p[token]), abs=2e-4)
            ids.append(token)


def test_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, expected in ((0.5, [1, 0, 0, 0]), (0.6, [2 / 3, 1 / 3, 0, 0]), (1.0, [0.5, 0.25, 0.125, 0.125])):
        p = sampling_logprobs(logits, Sampling(temperature=1.0, top_p=top_p)).exp()
        assert p[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert sampling_logprobs(logits, Sampling(temperature=1.0, top_p=1e-9)).exp()[0].tolist() == [1, 0, 0, 0]
    # Squared and renormalised at temperature one half.
    p = sampling_logprobs(logits[:, :2], Sampling(temperature=0.5)).exp()
    assert p[0].tolist() == pytest.approx([0.8, 0.2])


class Scripted(torch.nn.Module):
    """A backbone that says a fixed text, then its end token."""

    def __init__(self, text):
        super().__init__()
        from bestiary.shared.language.byte_tokenizer import ByteTokenizer

        self.tokenizer, self.said = ByteTokenizer(), [*text.encode(), 257]
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def embed(self, ids):
        return ids

    def new_cache(self, rows):
        return [0]

    def forward(self, embeds, mask=None, position=None, seq_idx=None, cache=None, keep=0):
        logits = torch.zeros(len(embeds), 1, 262)
        logits[:, :, self.said[min(cache[0], len(self.said) - 1)]] = 50.0
        return logits, None, [cache[0] + 1]


def test_ends():
    model = CausalLM(Scripted("one two three"))
    batch = prompts(model)
    rollout = model.generate(batch, 1)
    assert rollout.texts == ["one two three"] * 3
    assert rollout.finish_reasons == ["stop"] * 3
    assert rollout.completion_ids[0].tolist() == [*b"one two three", 257]
    assert rollout.mask.all()  # the end token is the policy's own
    cut = model.generate(batch, 1, Sampling(5))
    assert (cut.texts[0], cut.finish_reasons[0]) == ("one t", "length")
    stopped = model.generate(batch, 1, Sampling(64, stop=("zzz", "two")))
    assert (stopped.texts[0], stopped.finish_reasons[0]) == ("one two", "stop")
    assert stopped.completion_ids.shape[1] == 7


def test_rows_that_end_early_are_padded(model):
    """With a stop string that only some rows reach, the others are what they would have been."""
    free = model.generate(prompts(model), 1, Sampling(10))
    stop = free.texts[0][:2]
    rollout = model.generate(prompts(model), 1, Sampling(10, stop=(stop,)))
    kept = int(rollout.mask[0].sum())
    assert rollout.finish_reasons[0] == "stop"
    assert stop in rollout.texts[0]
    assert kept < 10
    assert (rollout.completion_ids[0, kept:] == 256).all()
    assert (rollout.logprobs[0, kept:] == 0).all()
    for row in (1, 2):
        if stop not in free.texts[row]:
            assert rollout.texts[row] == free.texts[row]


# ------------------------------------------------------------------ prompts from files


def test_prompts_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo ü\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two ü"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\nline", "x": 1}\n\n{"prompt": "two"}')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "has no prompt"),
        ("a.txt", b" \n\n", "has no prompt"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.csv", b"x", r"\.txt \(one a line\) or \.jsonl"),
        ("a", b"x", r"\.jsonl"),
        ("a.jsonl", b"", "has no prompt"),
        ("a.jsonl", b"{", "must be JSON"),
        ("a.jsonl", b'{"question": "x"}', "must be JSON"),
        ("a.jsonl", b'["x"]', "must be JSON"),
        ("a.jsonl", b'"x"', "must be JSON"),
        ("a.jsonl", b'{"prompt": 5}', "must be JSON"),
        ("a.jsonl", b'{"prompt": null}', "must be JSON"),
    ],
)
def test_files_that_are_no_prompts(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataError, match=words) as caught:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadDataError, match=r"none\.txt: there is no such file"):
        read_prompts(tmp_path / "none.txt")


def test_predict_answers_every_prompt_in_order(tmp_path):
    model = CausalLM(backbone(), max_new_tokens=3).eval()
    (tmp_path / "a.txt").write_text("".join(f"prompt {i}\n" for i in range(20)))
    (tmp_path / "b.jsonl").write_text('{"prompt": "last ü"}')
    (file,) = model.predict([tmp_path / "a.txt", str(tmp_path / "b.jsonl")], tmp_path / "out" / "deep")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [x["prompt"] for x in lines] == [f"prompt {i}" for i in range(20)] + ["last ü"]
    # In batches of 16 or alone, the answers are the same.
    for at in (0, 17, 20):
        assert lines[at]["answer"] == model.generate(prompts(model, [lines[at]["prompt"]])).texts[0]
