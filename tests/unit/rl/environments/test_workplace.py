"""The workplace: worlds, policies and what they are paid for."""

import copy
import itertools
import json
import sqlite3

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.environments.tool_environment import call_tool, play
from bestiary.shared.rl.environments.workplace import Workplace
from bestiary.shared.rl.environments.workplace_tasks import TEMPLATES
from bestiary.shared.rl.environments.workplace_tools import TOOLS
from bestiary.shared.rl.environments.workplace_world import TABLES, World, make_rows
from bestiary.shared.rl.protocols import Environment
from bestiary.shared.rl.tasks.workplace import WorkplaceTasks
from bestiary.shared.rl.tool_calls import ToolCall


@pytest.fixture(scope="module")
def examples():
    data = WorkplaceTasks()
    found = [data.train_example(k, Stream(0, "rl", 8)) for k in range(400)]
    assert {e["meta"]["template"] for e in found} == set(TEMPLATES)
    return found


# ------------------------------------------------------------------ worlds


def test_worlds_come_from_their_seed():
    assert make_rows(5) == make_rows.__wrapped__(5)
    assert len({make_rows(seed) for seed in range(50)}) == 50
    for seed in range(50):
        rows = make_rows(seed)
        for values in (
            [c[1] for c in rows.contacts],
            [c[2] for c in rows.contacts],
            [m[1] for m in rows.meetings],
            [m[4] for m in rows.mails],
            [t[1] for t in rows.tasks],
        ):
            assert len(set(values)) == len(values) == 8
        known = {c[2] for c in rows.contacts}
        assert {m[2] for m in rows.meetings} | {m[2] for m in rows.mails} | {t[2] for t in rows.tasks} <= known


def test_an_episode_does_not_touch_another():
    environment = Workplace()
    asked = {"id": "a", "messages": [text_message("user", "…")], "answer": "Done.", "meta": {"gold_calls": []}}
    one, other, third = (environment.reset(asked, seed) for seed in (3, 3, 4))
    assert one.world.state() == other.world.state() != third.world.state()
    one.step('<tool_call>{"name": "cancel_meeting", "arguments": {"meeting": 1}}</tool_call>')
    assert one.world.state() != other.world.state()
    assert one.verify("Done.").score == 0.0
    assert other.verify("Done.").score == 1.0
    for episode in (one, other, third):
        episode.close()
        episode.close()
    with pytest.raises(sqlite3.ProgrammingError):
        one.world.state()


# ------------------------------------------------------------------ policies


@pytest.mark.parametrize("form", ["hermes", "nemotron_nano_v2", "nemotron_3", "compact"])
def test_the_oracle_solves_every_task(form, examples):
    environment = Workplace(form)
    assert isinstance(environment, Environment)
    for example in examples:
        said, verdict = play(environment, example, environment.turns_of(example))
        assert (verdict.score, verdict.status, verdict.note) == (1.0, "ok", "")
        assert not any(answer.startswith("error") for answer in said)
        assert "nothing found" not in said or example["meta"].get("fact") == {"number": "0"}
    assert environment.counters()["tools/errors"] == 0.0


def test_the_oracle_needs_no_look_ups(examples):
    environment = Workplace()
    for example in examples:
        changes = [c for c in example["meta"]["gold_calls"] if not c["name"].startswith("find_")]
        short = {**example, "meta": {**example["meta"], "gold_calls": changes}}
        assert play(environment, example, environment.turns_of(short))[1].score == 1.0


def test_doing_nothing_solves_no_task(examples):
    environment = Workplace()
    for example in examples:
        for text in ("", "Done.", "I cannot do that."):
            assert play(environment, example, [text])[1].score == 0.0


def test_half_the_work_is_worth_nothing(examples):
    environment = Workplace()
    count = 0
    for example in examples:
        calls = [i for i, c in enumerate(example["meta"]["gold_calls"]) if not c["name"].startswith("find_")]
        for left_out in calls:
            turns = environment.turns_of(example)
            del turns[left_out]
            assert play(environment, example, turns)[1].score == 0.0
            count += 1
    assert count > 200


EXTRA = (
    ("update_contact", {"contact": 1, "company": "Elsewhere"}),
    ("cancel_meeting", {"meeting": 1}),
    ("delete_mail", {"mail": 1}),
    ("update_task", {"task": 1, "status": "done"}),
    ("move_meeting", {"meeting": 1, "day": "Friday", "time": "23:59"}),
)


def test_an_extra_change_is_worth_nothing(examples):
    environment = Workplace()
    for example, (name, arguments) in zip(examples, itertools.cycle(EXTRA)):
        # Not an extra one where the task itself is about that row.
        if any(set(c["arguments"].items()) & set(arguments.items()) for c in example["meta"]["gold_calls"]):
            continue
        turns = environment.turns_of(example)
        turns.insert(0, environment.format.render([ToolCall(name, arguments)]))
        said, verdict = play(environment, example, turns)
        assert said[0] == "done" or said[0].startswith("error: there is no")
        assert verdict.score == 0.0
    for example in examples[:100]:
        mail = make_rows(example["meta"]["world"]).contacts[0][2]
        sent = ToolCall("send_mail", {"to": mail, "subject": "a", "body": "b"})
        turns = [environment.format.render([sent]), *environment.turns_of(example)]
        assert play(environment, example, turns)[1].score == 0.0


def test_the_order_of_new_rows_is_of_no_matter():
    calls = [
        {"name": "send_mail", "arguments": {"to": "", "subject": subject, "body": "b"}} for subject in ("one", "two")
    ]
    for call in calls:
        call["arguments"]["to"] = make_rows(0).contacts[0][2]
    example = {
        "id": "a",
        "messages": [text_message("user", "…")],
        "answer": "Done.",
        "meta": {"gold_calls": calls, "world": 0},
    }
    environment = Workplace()
    first, second, end = environment.turns_of(example)
    assert play(environment, example, [second, first, end])[1].score == 1.0
    assert play(environment, example, [first, first, end])[1].score == 0.0
    assert play(environment, example, [first, second, first, end])[1].score == 0.0


def test_a_mail_sent_back_and_forth_is_not_undone():
    """Deleting a row and making an equal one is a change: the new row is not the one that was there."""
    rows = make_rows(0)
    _, title, who, day, time, minutes = rows.meetings[-1]
    asked = {
        "id": "a",
        "messages": [text_message("user", "…")],
        "answer": "Done.",
        "meta": {"gold_calls": [], "world": 0},
    }
    environment = Workplace()
    new = {"title": title, "attendee": who, "day": day, "time": time, "minutes": minutes}
    calls = [ToolCall("cancel_meeting", {"meeting": len(rows.meetings)}), ToolCall("schedule_meeting", new)]
    assert play(environment, asked, [environment.format.render(calls), "Done."])[1].score == 0.0


def facts(examples):
    return [e for e in examples if "fact" in e["meta"]]


def test_a_fact_must_be_in_the_answer_and_no_other(examples):
    environment = Workplace()
    asked = facts(examples)
    assert len(asked) > 40
    for example in asked:
        fact, rows = example["meta"]["fact"], make_rows(example["meta"]["world"])
        turns = environment.turns_of(example)[:-1]

        def score(text, example=example, turns=turns):
            return play(environment, example, [*turns, text])[1].score

        sentence = "It is " + " at ".join(fact.values())
        assert score(sentence + ".") == 1.0
        assert score(f"<think>{rows}</think>\n{sentence}") == 1.0
        assert score("I do not know") == 0.0
        assert score(f"<think>{sentence}</think>I do not know") == 0.0
        everything = " ".join(c[2] for c in rows.contacts) + " Monday Tuesday Friday 09:00 10:00 1 2 3 4 5 6 7 8"
        assert score(f"{sentence} {everything}") == 0.0
        assert score(everything) == 0.0
        # A right answer with a change is worth nothing.
        cancel = environment.format.render([ToolCall("cancel_meeting", {"meeting": 2})])
        assert play(environment, example, [cancel, *turns, sentence])[1].score == 0.0


def test_facts_are_those_of_the_world(examples):
    """Worked out anew from the rows, not by the template's own calls."""
    for example in facts(examples):
        rows, meta = make_rows(example["meta"]["world"]), example["meta"]
        words = meta["arguments"]
        if meta["template"] == "ask_address":
            wanted = {"mail": {c[1]: c[2] for c in rows.contacts}[words["name"]]}
        elif meta["template"] == "ask_time":
            wanted = {m[1]: {"day": m[3], "time": m[4]} for m in rows.meetings}[words["title"]]
        else:
            mail = {c[1]: c[2] for c in rows.contacts}[words["name"]]
            wanted = {"number": str(len([t for t in rows.tasks if t[2:] == (mail, "open")]))}
        assert meta["fact"] == wanted


def test_hostile_policies(examples):
    environment = Workplace(max_turns=3)
    nasty = [
        "<tool_call>" * 100_000,
        '<tool_call>{"name": "send_mail", "arguments": {"body": "' + "x" * 10_000_000 + '"}}</tool_call>',
        "<tool_call>" + "[" * 50_000 + "</tool_call>",
        '<tool_call>{"name": "cancel_meeting", "arguments": {"meeting": ' + "9" * 5000 + "}}</tool_call>",
        "\0" * 1000,
        "\ud800",
        "@" * 10_000_000,
        "a@" * 900,
    ]
    for example in (facts(examples)[0], next(e for e in examples if "fact" not in e["meta"])):
        for text in nasty:
            said, verdict = play(environment, example, [text] * 5)
            assert (verdict.score, verdict.status) == (0.0, "ok")
            assert all(len(answer) <= 2100 for answer in said)


def test_who_repeats_calls_for_ever_is_cut(examples):
    environment = Workplace(max_turns=4, max_calls=3)
    example = examples[0]
    said, verdict = play(environment, example, [environment.turns_of(example)[0]] * 50)
    assert len(said) == 4
    assert said[-1].startswith("error: at most 3 calls")
    assert verdict.score == 0.0


def test_an_expected_call_that_fails_is_an_error_of_the_harness(examples):
    environment = Workplace()
    broken = copy.deepcopy(examples[0])
    broken["meta"]["gold_calls"].append({"name": "cancel_meeting", "arguments": {"meeting": 999}})
    assert play(environment, broken, ["Done."])[1].status == "error"
    with pytest.raises(ConfigError, match="must score 1 and 0"):
        environment.self_test([broken])
    idle = {**examples[0], "meta": {**examples[0]["meta"], "gold_calls": []}}
    idle["meta"].pop("fact", None)
    with pytest.raises(ConfigError, match="doing nothing scores 1"):
        environment.self_test([idle])
    with pytest.raises(BadDataError, match=r"no task of the workplace.*dataset=workplace_tasks"):
        environment.self_test([{"id": "a", "messages": []}])
    with pytest.raises(ConfigError, match="max_turns is 1"):
        Workplace(max_turns=1).self_test(examples[:5])
    assert "solve 20 examples" in environment.self_test(examples[:20])
    assert "solve 20 examples" in Workplace(thinking=True).self_test(examples[:20])


def test_equal_episodes_are_equal(examples):
    environment = Workplace()
    for example in examples[:50]:
        turns = environment.turns_of(example)
        assert play(environment, example, turns, 1) == play(environment, example, turns, 2)
        assert json.loads(json.dumps(example["meta"])) == example["meta"]


def test_each_template_by_its_words():
    """The rows that a task changes are those its words name."""
    rng = np.random.default_rng(0)
    for seed in range(40):
        rows = make_rows(seed)
        mails = {c[1]: c[2] for c in rows.contacts}
        for name, template in TEMPLATES.items():
            draft = template.draw(rows, rng)
            world = World(rows)
            before = world.state()
            for call in draft.calls:
                assert call_tool(TOOLS, world, ToolCall(call["name"], call["arguments"]))[1]
            after = world.state()
            gone = {t: sorted(set(before[t]) - set(after[t])) for t in TABLES}
            new = {t: sorted(set(after[t]) - set(before[t])) for t in TABLES}
            words = draft.words
            if draft.fact:
                assert before == after
            elif name in ("cancel", "move"):
                assert [m[1] for m in gone["meetings"]] == [words["title"]]
                assert [m[3:5] for m in new["meetings"]] == ([(words["day"], words["time"])] if name == "move" else [])
            elif name == "cancel_all":
                assert gone["meetings"] == [m for m in rows.meetings if m[2] == mails[words["name"]]]
            elif name == "schedule":
                assert [m[1:] for m in new["meetings"]] == [
                    (words["title"], mails[words["name"]], words["day"], words["time"], words["minutes"])
                ]
            elif name in ("send", "forward"):
                ((_, folder, _, to, subject, _),) = new["mails"]
                assert (folder, to) == ("sent", mails[words["name"]])
                assert subject == ("Fwd: " if name == "forward" else "") + words["subject"]
            elif name == "delete":
                assert [m[4] for m in gone["mails"]] == [words["subject"]]
            elif name in ("assign", "close"):
                assert [t[1] for t in gone["tasks"]] == [words["title"]]
                assert new["tasks"][0][3 if name == "close" else 2] == (
                    "done" if name == "close" else mails[words["name"]]
                )
            elif name == "close_all":
                assert gone["tasks"] == [t for t in rows.tasks if t[2:] == (mails[words["name"]], "open")]
            else:
                assert [c[1] for c in gone["contacts"]] == [words["name"]]
                assert new["contacts"][0][3] == words["company"]
            assert draft.fact or before != after
            world.close()
