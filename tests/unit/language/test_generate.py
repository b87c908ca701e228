"""Generation: sampling against transformers, and everything that may happen to a row, with scripted backbones."""

import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.generate import Generation, ThinkBudget, generate, sampling_logprobs
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.language.processor import TextProcessor


@pytest.fixture(scope="module")
def lm(small_sizes):
    torch.manual_seed(0)
    return HFCausalLM("llama", small_sizes).eval()


def prompts(*texts, tokenizer=None):
    return TextProcessor(tokenizer or ByteTokenizer())(
        [{"id": f"p{i}", "messages": [text_message("user", t)]} for i, t in enumerate(texts)], "prompt"
    )


class Scripted(torch.nn.Module):
    """Says row r's script, token after token; remembers what it was asked."""

    class Cache:
        def __init__(self, rows):
            self.rows, self.step = torch.arange(rows), 0

        def select(self, rows):
            self.rows = self.rows[rows]

    def __init__(self, *scripts, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer or ByteTokenizer()
        self.scripts = [[*s.encode(), 257] if isinstance(s, str) else s for s in scripts]
        self.calls = []

    def embed(self, ids):
        return ids[..., None].float()

    def new_cache(self, rows):
        return self.Cache(rows)

    def forward(self, embeds, mask, position, seq_idx, cache, keep):
        assert mask.shape[0] == embeds.shape[0] == len(cache.rows) == len(position)
        self.calls.append((tuple(embeds.shape[:2]), embeds[:, -1, 0].int().tolist(), position[:, -1].tolist()))
        logits = torch.zeros(len(cache.rows), 1, 300)
        for at, row in enumerate(cache.rows.tolist()):
            script = self.scripts[row % len(self.scripts)]
            logits[at, 0, script[min(cache.step, len(script) - 1)]] = 50.0
        cache.step += 1
        return logits, embeds, cache


# ------------------------------------------------------------------ the distribution


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.95},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 0.8, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.3, "top_k": 1, "top_p": 0.5, "min_p": 1.0},
        {"temperature": 1.0, "top_p": 0.001},
        {"temperature": 1.0, "top_k": 10**6},
    ],
)
def test_the_distribution_is_that_of_transformers_warpers(values):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(3)) * 4
    warpers = LogitsProcessorList([TemperatureLogitsWarper(values["temperature"])])
    if "top_k" in values:
        warpers.append(TopKLogitsWarper(values["top_k"]))
    if "top_p" in values:
        warpers.append(TopPLogitsWarper(values["top_p"]))
    if "min_p" in values:
        warpers.append(MinPLogitsWarper(values["min_p"]))
    expected = torch.softmax(warpers(None, logits.clone()), -1)
    got = sampling_logprobs(logits, Sampling(**values))
    torch.testing.assert_close(got.exp(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(got > -torch.inf, expected > 0)
    # Any leading shape: what trainers have is (B, T, V).
    assert torch.equal(sampling_logprobs(logits.reshape(8, 8, 300), Sampling(**values)).reshape(64, 300), got)


def test_cuts_by_hand():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def p(**values):
        return sampling_logprobs(logits, Sampling(temperature=1.0, **values)).exp()[0].tolist()

    assert p(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert p(min_p=0.45) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    # top_p counts what top_k has left: 4/7 is not 0.5, but it is over it.
    assert p(top_k=2, top_p=0.5) == pytest.approx([1, 0, 0, 0])
    # Greedy is of the whole distribution.
    assert sampling_logprobs(logits, Sampling(top_k=1, top_p=0.1)).exp()[0].tolist() == pytest.approx(
        [0.4, 0.3, 0.2, 0.1]
    )


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_sampling_that_makes_no_sense(lm, values, word):
    with pytest.raises(ConfigError, match=word):
        Generation(lm, prompts("a"), 1, Sampling(**values))


@pytest.mark.parametrize(
    "sampling", [Sampling(24), Sampling(24, 1.0, seed=5), Sampling(24, 0.7, 0.9, 2, (), 40, 0.02), Sampling(24, 1.4)]
)
def test_teacher_forcing_gives_the_rollouts_logprobs_again(lm, sampling):
    batch = prompts("hello", "a longer prompt than that", "x")
    rollout = generate(lm, batch, 3, sampling)
    rows = torch.arange(3).repeat_interleave(3)
    ids = torch.cat([batch["input_ids"][rows], rollout.completion_ids], 1)
    mask = torch.cat([batch["attention_mask"][rows], torch.ones_like(rollout.completion_ids)], 1)
    with torch.no_grad():
        logits, _, _ = lm(lm.embed(ids), mask)
    width = rollout.completion_ids.shape[1]
    logprobs = sampling_logprobs(logits[:, -width - 1 : -1], sampling)
    again = logprobs.gather(2, rollout.completion_ids[..., None])[..., 0]
    assert rollout.mask.float().mean() > 0.5
    torch.testing.assert_close(again[rollout.mask], rollout.logprobs[rollout.mask], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ the batch


def test_the_prompt_is_run_once_and_its_rows_are_repeated():
    model = Scripted("ab", "xyz")
    rollout = generate(model, prompts("one", "two, longer"), 3, Sampling(8))
    width = len("two, longer") + 3
    assert [c[0] for c in model.calls] == [(2, width), (6, 1), (6, 1), (3, 1)]  # the first three rows leave
    assert rollout.texts == ["ab"] * 3 + ["xyz"] * 3
    assert rollout.completion_ids.shape == (6, 4)
    assert rollout.completion_ids[0].tolist() == [*b"ab", 257, 256]
    assert rollout.mask.sum(1).tolist() == [3, 3, 3, 4, 4, 4]
    # Positions go on from each row's own prompt.
    assert model.calls[1][2] == [len("one") + 3] * 3 + [width] * 3


def test_rows_that_leave_do_not_disturb_the_others(lm):
    """Noise, cache, mask and positions follow the rows that stay."""
    texts = ["say apple", "upper x", "a"]
    sampling = Sampling(20, 1.0, seed=1)
    free = generate(lm, prompts(*texts), 2, sampling)
    stop = free.texts[2][1:3]
    stopped = generate(lm, prompts(*texts), 2, Sampling(20, 1.0, seed=1, stop=(stop,)))
    assert stopped.finish_reasons[2] == "stop"
    assert "length" in stopped.finish_reasons
    for row in range(6):
        own = int(stopped.mask[row].sum())
        assert torch.equal(stopped.completion_ids[row, :own], free.completion_ids[row, :own])
        torch.testing.assert_close(stopped.logprobs[row, :own], free.logprobs[row, :own], rtol=1e-4, atol=1e-4)
        assert stop not in free.texts[row] or stopped.finish_reasons[row] == "stop"


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_prompts_in_chunks(lm, chunk):
    batch = prompts("a prompt of some length", "short")
    whole = generate(lm, batch, 2, Sampling(6, 1.0))
    parts = generate(lm, batch, 2, Sampling(6, 1.0), prefill_chunk=chunk)
    assert torch.equal(whole.completion_ids, parts.completion_ids)
    torch.testing.assert_close(whole.logprobs, parts.logprobs, rtol=1e-4, atol=1e-5)


def test_embeddings_in_place_of_token_ids(lm):
    batch = prompts("the real prompt", "b")
    embeds = lm.embed(batch["input_ids"])
    blank = {**batch, "input_ids": torch.zeros_like(batch["input_ids"])}
    expected, got = generate(lm, batch, 2, Sampling(5)), generate(lm, blank, 2, Sampling(5), inputs_embeds=embeds)
    assert torch.equal(expected.completion_ids, got.completion_ids)


# ------------------------------------------------------------------ ends


def test_any_of_the_stop_tokens_ends_a_row():
    tokenizer = ByteTokenizer()
    tokenizer.stop_ids = (261, 259)
    model = Scripted([*b"ab", 259], [*b"abc", 261], [*b"a", 257], [*b"abcdef"], tokenizer=tokenizer)
    rollout = generate(model, prompts("1", "2", "3", "4"), 1, Sampling(5))
    assert rollout.texts == ["ab", "abc", "a", "abcde"]
    assert rollout.finish_reasons == ["stop", "stop", "stop", "length"]
    assert rollout.mask.sum(1).tolist() == [3, 4, 2, 5]


def test_stop_strings_of_several_tokens_and_characters():
    model = Scripted("one END two", "ENEND two", "x → y", "no end")
    rollout = generate(model, prompts(*"1234"), 1, Sampling(30, stop=("END", "→", "never")))
    assert rollout.texts == ["one END", "ENEND", "x →", "no end"]
    assert rollout.finish_reasons == ["stop"] * 4


# ------------------------------------------------------------------ streaming


def streamed(model, batch, *arguments, **options):
    run = Generation(model, batch, *arguments, **options)
    pieces = list(run.stream())
    assert all(piece for _, piece in pieces)
    return run, pieces


def test_a_stream_has_whole_characters_and_all_the_text():
    texts = ["plain", "日本語 né 😀!", "a\ufffdb", ""]
    run, pieces = streamed(Scripted(*texts), prompts(*"1234"), 1, Sampling(64))
    for row, text in enumerate(texts):
        parts = [piece for at, piece in pieces if at == row]
        assert "".join(parts) == text == run.rollout().texts[row]
        assert row == 2 or not any("\ufffd" in p for p in parts)
    assert [p for at, p in pieces if at == 1][:3] == ["日", "本", "語"]


def test_bytes_that_are_no_text_come_out_in_the_end():
    raw = [0xE6, 0x97, 65, 0xFF, 0xFE, 0xFD, 0xFC, 66, 0xF0, 0x9F]
    for limit in (len(raw), 64):
        run, pieces = streamed(Scripted([*raw, 257]), prompts("1"), 1, Sampling(limit))
        assert "".join(p for _, p in pieces) == bytes(raw).decode(errors="replace") == run.rollout().texts[0]


def test_a_long_stream_is_its_text():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (500,), generator=generator).tolist()
    _, pieces = streamed(Scripted([*raw, 257]), prompts("1"), 1, Sampling(600))
    assert "".join(p for _, p in pieces) == bytes(raw).decode(errors="replace")
    assert len(pieces) > 100


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("abcEND", ("END",), "abc"),
        ("abcEN", ("END",), "abcEN"),  # it was not one
        ("abcENENDx", ("END",), "abcEN"),
        ("aabaabaac", ("aabaac",), "aab"),  # begins inside a beginning of itself
        ("one\n\nUser: x", ("\nUser:", "\n\n\n"), "one\n"),
        ("abcd", ("bcx", "cd"), "ab"),
        ("no", ("",), "no"),
    ],
)
def test_a_stream_shows_nothing_of_a_stop_string(text, stop, shown):
    run, pieces = streamed(Scripted(text), prompts("1"), 1, Sampling(64, stop=stop))
    assert "".join(p for _, p in pieces) == shown
    assert run.rollout().texts[0].startswith(shown)  # which keeps it


def test_a_stream_that_is_left_early(lm):
    run = Generation(lm, prompts("a"), 1, Sampling(50, 1.0))
    for number, _ in enumerate(run.stream()):
        if number == 3:
            break
    rollout = run.rollout()
    assert 4 <= rollout.completion_ids.shape[1] <= 16
    assert rollout.finish_reasons == ["length"]
    whole = generate(lm, prompts("a"), 1, Sampling(50, 1.0))
    width = rollout.completion_ids.shape[1]
    assert torch.equal(whole.completion_ids[:, :width], rollout.completion_ids)


# ------------------------------------------------------------------ a budget for thoughts


def budgeted(script, tokens, slack=500, prompt="q", n=1, limit=80, end="<think>\n", **options):
    model = Scripted(*([script] if isinstance(script, str) else script))
    batch = TextProcessor(model.tokenizer)([{"id": "p", "text": prompt + end}], "prompt")
    think = ThinkBudget(tokens=tokens, slack=slack, **options)
    return model, generate(model, batch, n, Sampling(limit), think=think)


def test_a_thought_is_cut_at_the_next_newline():
    #          0123 4567 89
    script = "one\ntwo\nthree\nfour"
    model, rollout = budgeted(script, 5)
    # Five tokens are spent inside "two"; its newline is the next. What was drawn meanwhile is lost.
    assert rollout.texts[0].startswith("one\ntwo\n</think>")
    own = rollout.mask[0].tolist()
    assert own[:8] == [True] * 8
    assert own[8:16] == [False] * 8
    assert all(own[16:])
    assert rollout.logprobs[0, 8:16].tolist() == [0.0] * 8
    assert rollout.completion_ids[0, 8:16].tolist() == list(b"</think>")
    # The model saw the forced tokens.
    assert [c[1][0] for c in model.calls[9:17]] == list(b"</think>")


@pytest.mark.parametrize(
    ("script", "tokens", "slack", "starts"),
    [
        ("abcdefghij", 3, 4, "abcdefg</think>"),  # no newline: at most four more
        ("abc\nefghij", 3, 0, "abc</think>"),
        ("ab\ndefghij", 3, 9, "ab\n</think>"),  # the newline is the last token of the budget
        ("abcdef", 0, 9, "</think>"),
        ("ab<<<<<<<<<<<<<<", 3, 0, "ab" + 9 * "<" + "</think>"),  # waits for what may be its own end, but not for long
    ],
)
def test_budgets_by_hand(script, tokens, slack, starts):
    assert budgeted(script, tokens, slack)[1].texts[0].startswith(starts)


@pytest.mark.parametrize(
    ("script", "tokens", "slack"),
    [
        ("ab</think>done", 3, 0),  # is ending of itself when the budget is spent
        ("a</think>done\nand\nmore", 30, 0),
        ("a</think>b\nc", 9, 0),  # spent to the last token; nothing more is thought
    ],
)
def test_budgets_that_are_not_exceeded(script, tokens, slack):
    _, rollout = budgeted(script, tokens, slack)
    assert rollout.texts[0] == script
    assert rollout.mask.all()


def test_a_prompt_that_does_not_think_has_no_budget():
    for end in ("", "<think></think>", "<think>\n\n</think>\n\n"):
        _, rollout = budgeted("ab\ncd\nef", 1, 0, end=end)
        assert rollout.texts[0] == "ab\ncd\nef"


def test_a_thought_that_the_model_opens_itself():
    _, rollout = budgeted("hm <think>abcdef\nghi", 4, 100, end="")
    assert rollout.texts[0].startswith("hm <think>abcdef\n</think>")
    # Two thoughts share the budget.
    _, rollout = budgeted("<think>abc</think>x<think>def\nghi", 5, 0, end="")
    assert rollout.texts[0].startswith("<think>abc</think>x<think></think>")


def test_other_tags_and_rows_of_their_own():
    _, rollout = budgeted("aaaa\nbbbb\ncc", 2, 9, end="[T]", open="[T]", close="[/T]\n", n=2)
    assert rollout.texts[0].startswith("aaaa\n[/T]\n")
    assert rollout.texts[0] == rollout.texts[1]


def test_a_tag_that_is_one_token():
    class Tagged(ByteTokenizer):
        def token_id(self, name):
            return self._specials.get(name)

    tokenizer = Tagged()
    opened, closed = tokenizer.add_tokens(["<think>", "</think>"])
    model = Scripted([*b"abc\ndef\n"] * 4, tokenizer=tokenizer)
    batch = TextProcessor(tokenizer)([{"id": "p", "text": "q"}], "prompt")
    batch["input_ids"] = torch.tensor([[113, opened, 10]])
    batch["attention_mask"], batch["position_ids"] = torch.ones(1, 3).long(), torch.arange(3)[None]
    rollout = generate(model, batch, 1, Sampling(12), think=ThinkBudget(tokens=2, slack=9))
    assert rollout.completion_ids[0, :5].tolist() == [*b"abc\n", closed]
    assert rollout.mask[0].sum() == 11


def test_a_stream_shows_what_was_forced():
    model = Scripted("one\ntwo\nthree")
    batch = TextProcessor(model.tokenizer)([{"id": "p", "text": "q<think>\n"}], "prompt")
    run, pieces = streamed(model, batch, 1, Sampling(20), think=ThinkBudget(tokens=2, slack=50))
    assert "".join(p for _, p in pieces) == run.rollout().texts[0]
    assert run.rollout().texts[0].startswith("one\n</think>")


@pytest.mark.parametrize("values", [{"tokens": -1}, {"slack": -1}, {"open": " "}, {"close": ""}])
def test_a_budget_that_makes_no_sense(values):
    with pytest.raises(ConfigError, match="budget of thoughts"):
        Generation(Scripted("a"), prompts("a"), 1, Sampling(1), think=ThinkBudget(**values))
