"""The workplace's tools, by hand and with whatever else is passed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.shared.rl.environments.tool_environment import call_tool
from bestiary.shared.rl.environments.workplace_tools import TOOLS
from bestiary.shared.rl.environments.workplace_world import TABLES, Rows, World
from bestiary.shared.rl.tool_calls import ToolCall

ANN, BOB = "ann.abt@acme.example", "bob.berg@boreal.example"
ROWS = Rows(
    contacts=((1, "Ann Abt", ANN, "Acme"), (2, "Bob Berg", BOB, "Boreal")),
    meetings=((1, "Budget review", ANN, "Monday", "09:00", 30), (2, "Sales sync", BOB, "Friday", "10:30", 60)),
    mails=((1, "inbox", BOB, "me@home.example", "Travel invoice", "See below."),),
    tasks=((1, "Draft the press plan", ANN, "open"), (2, "Check the design plan", BOB, "done")),
)


@pytest.fixture
def world():
    made = World(ROWS)
    yield made
    made.close()


def do(world, name, /, **arguments):
    return call_tool(TOOLS, world, ToolCall(name, arguments))


def test_each_tool_by_hand(world):
    assert do(world, "find_contact", name="ABT") == (f"1: Ann Abt, {ANN}, Acme", True)
    assert do(world, "find_contact", name="nobody") == ("nothing found", True)
    assert do(world, "find_meetings", day="Friday") == (f"2: Sales sync, Friday, 10:30, 60, {BOB}", True)
    assert do(world, "find_meetings")[0].count("\n") == 1
    assert do(world, "find_mail", sender="bob", subject="travel")[0].startswith("1: inbox, bob")
    assert do(world, "find_tasks", status="open") == (f"1: Draft the press plan, {ANN}, open", True)
    before = world.state()
    assert before["tasks"] == list(ROWS.tasks)

    assert do(world, "schedule_meeting", title="New", attendee=ANN, day="Tuesday", time="08:15", minutes=45)[1]
    assert do(world, "move_meeting", meeting=1, day="Wednesday", time="11:00") == ("done", True)
    assert do(world, "cancel_meeting", meeting=2) == ("done", True)
    assert do(world, "send_mail", to=ANN, subject="Hi", body="There.")[1]
    assert do(world, "forward_mail", mail=1, to=ANN)[1]
    assert do(world, "delete_mail", mail=1) == ("done", True)
    assert do(world, "update_task", task=1, assignee=BOB, status="done") == ("done", True)
    assert do(world, "update_contact", contact=2, company="Cobalt") == ("done", True)
    me = "me@home.example"
    assert world.state() == {
        "contacts": [ROWS.contacts[0], (2, "Bob Berg", BOB, "Cobalt")],
        "meetings": [(0, "New", ANN, "Tuesday", "08:15", 45), (1, "Budget review", ANN, "Wednesday", "11:00", 30)],
        "mails": [(0, "sent", me, ANN, "Fwd: Travel invoice", "See below."), (0, "sent", me, ANN, "Hi", "There.")],
        "tasks": [(1, "Draft the press plan", BOB, "done"), ROWS.tasks[1]],
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cancel_meeting", {"meeting": 99}),
        ("cancel_meeting", {"meeting": "1"}),
        ("cancel_meeting", {"meeting": True}),
        ("cancel_meeting", {"meeting": 1.5}),
        ("cancel_meeting", {"meeting": 10**30}),
        ("cancel_meeting", {"meeting": -1}),
        ("cancel_meeting", {"meeting": None}),
        ("cancel_meeting", {"meeting": [1]}),
        ("cancel_meeting", {"meeting": 1, "force": True}),
        ("cancel_meeting", {}),
        ("delete_mail", {"mail": 7}),
        ("move_meeting", {"meeting": 1, "day": "Sunday", "time": "09:00"}),
        ("move_meeting", {"meeting": 1, "day": "Monday", "time": "25:00"}),
        ("move_meeting", {"meeting": 1, "day": "Monday", "time": "9:00"}),
        ("move_meeting", {"meeting": 1, "day": "Monday", "time": "09:00\n"}),
        (
            "schedule_meeting",
            {"title": "A", "attendee": "x@y.example", "day": "Monday", "time": "09:00", "minutes": 30},
        ),
        ("schedule_meeting", {"title": "A", "attendee": ANN, "day": "Monday", "time": "09:00", "minutes": 0}),
        ("send_mail", {"to": "Ann Abt", "subject": "a", "body": "b"}),
        ("send_mail", {"to": ANN, "subject": "a", "body": "b" * 10_000_000}),
        ("send_mail", {"to": ANN, "subject": "a\0", "body": "b"}),
        ("send_mail", {"to": ANN, "subject": "\ud800", "body": "b"}),
        ("send_mail", {"to": ANN, "subject": "", "body": "b"}),
        ("update_task", {"task": 1}),
        ("update_task", {"task": 1, "status": "lost"}),
        ("drop_tables", {}),
        ("find_contact", {"name": {"a": {"b": []}}}),
    ],
)
def test_a_call_that_does_not_fit_changes_nothing(world, name, arguments):
    answer, good = do(world, name, **arguments)
    assert not good
    assert answer.startswith("error: ")
    assert len(answer) < 500
    assert world.state() == World(ROWS).state()


INJECTIONS = (
    "'; DROP TABLE mails; --",
    "x' OR '1'='1",
    '" OR 1=1 --',
    "1); DELETE FROM tasks; --",
    "' UNION SELECT sql, 1, 1, 1 FROM sqlite_master --",
    "%",
    "_",
    "*",
    "\\",
    "?",
    ":name",
)


@pytest.mark.parametrize("text", INJECTIONS)
def test_arguments_are_values_never_sql(world, text):
    for name, keys in (
        ("find_contact", ["name"]),
        ("find_mail", ["subject", "sender"]),
        ("find_meetings", ["title", "attendee"]),
        ("find_tasks", ["title", "assignee"]),
    ):
        answer, good = do(world, name, **dict.fromkeys(keys, text))
        assert good
        # "_" and "%" are no wildcards either, and no row holds any of these texts.
        assert answer == "nothing found"
    assert do(world, "update_contact", contact=1, company=text) == ("done", True)
    assert do(world, "send_mail", to=ANN, subject=text, body=text)[1]
    state = world.state()
    assert state["contacts"] == [(1, "Ann Abt", ANN, text), ROWS.contacts[1]]
    assert state["mails"] == [(0, "sent", "me@home.example", ANN, text, text), ROWS.mails[0]]
    assert [state[t] for t in ("meetings", "tasks")] == [list(ROWS.meetings), list(ROWS.tasks)]


@settings(max_examples=200, deadline=None)
@given(
    tool=st.sampled_from([tool.name for tool in TOOLS]),
    data=st.data(),
)
def test_any_arguments_are_answered(tool, data):
    properties = next(t for t in TOOLS if t.name == tool).parameters["properties"]
    values = st.one_of(
        st.text(max_size=20), st.sampled_from([*INJECTIONS, ANN, "Monday", "09:00", "open"]), st.integers(), st.floats()
    )
    arguments = data.draw(st.dictionaries(st.sampled_from([*properties, "other"]), values | st.integers(1, 3)))
    world = World(ROWS)
    answer, good = call_tool(TOOLS, world, ToolCall(tool, arguments))
    assert isinstance(answer, str)
    assert good != answer.startswith("error: ")
    assert set(world.state()) == set(TABLES)
    if not good:
        assert world.state() == World(ROWS).state()
    world.close()
