"""A conversation: what the model is shown at each turn, what a typed line does, what an interruption leaves."""

import io

import pytest
import torch
from omegaconf import OmegaConf

from bestiary.shared.core.config import conf_dir
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.chat import Chat, Timing, converse, read_settings, say, split_texts


class Echo(torch.nn.Module):
    """Answers with its last prompt's length and an end token; keeps what it was shown. ``stop_after`` raises Ctrl-C."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.tokenizer, self.shown, self.stop_after = ByteTokenizer(), [], stop_after
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def embed(self, ids):
        return ids

    def new_cache(self, rows):
        return []

    def forward(self, ids, mask, position, seq_idx, cache, keep):
        if not cache:
            names = {v: k for k, v in self.tokenizer._specials.items()}
            self.shown.append("".join(names.get(i, chr(i)) if i > 255 else chr(i) for i in ids[0].tolist()))
        said = f"answer {len(self.shown)}"
        if self.stop_after is not None and len(cache) == self.stop_after:
            raise KeyboardInterrupt
        logits = torch.zeros(1, 1, 262)
        logits[..., [*said.encode(), 257][len(cache)]] = 9.0
        return logits, None, [*cache, 0]


def chat_with(backbone, **options):
    return Chat(CausalLM(backbone), Sampling(32), **options)


def typed(chat, *lines):
    out, notes = io.StringIO(), io.StringIO()
    converse(chat, lines, out, notes)
    return out.getvalue(), notes.getvalue()


def test_the_model_sees_all_turns():
    backbone = Echo()
    chat = chat_with(backbone, system="sys")
    assert "".join(chat.answer("one")) == "answer 1"
    assert "".join(chat.answer("two")) == "answer 2"
    assert backbone.shown == [
        "<system>sys<eos><user>one<eos><assistant>",
        "<system>sys<eos><user>one<eos><assistant>answer 1<eos><user>two<eos><assistant>",
    ]
    assert chat.timing.tokens == 9
    assert chat.timing.finish == "stop"
    assert 0 < chat.timing.first_s <= chat.timing.seconds


def test_commands():
    backbone = Echo()
    chat = chat_with(backbone)
    out, notes = typed(
        chat, "one\n", "\n", "/reset", "two", "/think", "/no_think\n", "/rest", "/usr/bin is what?", "/quit", "no"
    )
    assert out == "answer 1\nanswer 2\nanswer 3\n"
    assert backbone.shown[1] == "<user>two<eos><assistant>"
    assert backbone.shown[2].endswith("<user>/usr/bin is what?<eos><assistant>")
    assert chat.thinking is False
    assert "there is no command /rest" in notes
    assert notes.count("tokens/s, first after") == 3


def test_raw_text_goes_on():
    backbone = Echo()
    chat = chat_with(backbone, raw=True)
    assert typed(chat, "one", "two")[0] == "answer 1\nanswer 2\n"
    assert backbone.shown == ["one", "two"]
    assert chat.messages == []


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    backbone = Echo(stop_after=4)
    chat = chat_with(backbone)
    out, notes = io.StringIO(), io.StringIO()
    assert not say(chat, "one", out, notes)
    assert out.getvalue() == "answ\n"
    assert "[4 tokens" in notes.getvalue()
    assert "stopped]" in notes.getvalue()
    backbone.stop_after = None
    assert say(chat, "two", out, notes)
    assert backbone.shown[1] == "<user>one<eos><assistant>answ<eos><user>two<eos><assistant>"


def test_ctrl_c_before_the_first_word_leaves_no_turn():
    backbone = Echo(stop_after=0)
    chat = chat_with(backbone)
    assert not say(chat, "one", io.StringIO(), io.StringIO())
    assert chat.messages == []


def test_a_turn_that_the_template_refuses():
    backbone = Echo()

    def chat(messages, add_generation_prompt=False, thinking=None):
        if len(messages) == 1:
            raise BadDataError("not alone")
        return [65], [False]

    backbone.tokenizer.chat = chat
    out, notes = typed(chat_with(backbone), "one", "/reset")
    assert out == ""
    assert notes == "not alone\n[all forgotten]\n"


def test_thinking_reaches_the_template():
    backbone, seen = Echo(), []
    backbone.tokenizer.chat = lambda messages, prompt, thinking: (seen.append(thinking), ([65], [False]))[1]
    typed(chat_with(backbone, thinking=True), "a", "/no_think", "b")
    typed(chat_with(backbone), "c")
    assert seen == [True, False, None]


def test_timing():
    assert str(Timing(11, 0.5, 2.5, "stop")) == "[11 tokens, 5.0 tokens/s, first after 0.50 s]"
    assert str(Timing(1, 0.5, 0.5, "length")) == "[1 tokens, first after 0.50 s, cut at max_new_tokens]"


def settings(**changes):
    return read_settings(OmegaConf.merge(OmegaConf.load(conf_dir() / "chat.yaml"), changes))


def test_settings():
    values = settings(temperature=0, stop="\n", think=False, budget=10)
    assert values["sampling"] == Sampling(512, 0, 0.95, 0, ("\n",), 0, 0.0)
    assert (values["thinking"], values["budget"], values["raw"]) == (False, 10, False)
    assert settings()["thinking"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a number without a fraction"),
        ({"top_k": True}, "top_k must be a number"),
        ({"top_p": 2}, "top_p must be above 0"),
        ({"think": "yes"}, "think must be true or false"),
        ({"raw": None}, "raw must be true or false"),
        ({"budget": "x"}, "budget must be a number of tokens"),
        ({"budget": -1}, "budget must be 0 or more"),
    ],
)
def test_settings_of_the_wrong_kind(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def test_texts_are_taken_word_for_word():
    text = "What is {1, 2}? $HOME ${x} 'a' = \"b\" (c)"
    texts, rest = split_texts([f"prompt={text}", "backbone=x", "system=a,b", "backbone.path=/a=b", "--cfg", "job"])
    assert texts == {"prompt": text, "system": "a,b"}
    assert rest == ["backbone=x", "backbone.path=/a=b", "--cfg", "job"]
    with pytest.raises(ConfigError, match="prompt= is empty"):
        split_texts(["prompt= "])
    with pytest.raises(ConfigError, match=r"no key 'tempretur'; did you mean 'temperature'"):
        split_texts(["tempretur=1"])
    with pytest.raises(ConfigError, match="'hello' is not key=value"):
        split_texts(["hello"])


def test_what_cannot_fit_is_refused_before_it_is_built(monkeypatch):
    from omegaconf import OmegaConf

    from bestiary.shared.core.config import conf_dir
    from bestiary.shared.language.chat import refuse_what_cannot_fit

    node = OmegaConf.load(conf_dir() / "backbone" / "llama_tiny.yaml")
    refuse_what_cannot_fit(node, "cpu")
    monkeypatch.setattr("bestiary.shared.language.chat.available_memory", lambda device: 10**6)
    with pytest.raises(ConfigError, match=r"weights take 0\.0 GiB"):
        refuse_what_cannot_fit(node, "cpu")
