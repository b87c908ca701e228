"""What is asked at the workplace: templates with wordings, the calls that solve them, and the facts they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bestiary.shared.rl.environments.workplace_world import COMPANIES, DAYS, MEETINGS, TOPICS, Rows

Call = dict[str, Any]
"""``{"name": …, "arguments": {…}}``, plain data."""


@dataclass(frozen=True)
class Draft:
    """One task.

    Attributes:
        words: what the wording of its template is filled with.
        calls: what solves it, look-ups first.
        fact: for a task that only asks: kind to value (``mail``, ``day``, ``time``, ``number``); else empty.
    """

    words: dict[str, Any]
    calls: list[Call]
    fact: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """A kind of task.

    Attributes:
        wordings: ways to ask for it.
        draw: (rows of a world, generator) to a task whose solution changes that world, unless it asks for a fact.
    """

    wordings: tuple[str, ...]
    draw: Callable[[Rows, np.random.Generator], Draft]


def _one(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _call(tool: str, **arguments: Any) -> Call:
    return {"name": tool, "arguments": arguments}


def _name(rows: Rows, mail: str) -> str:
    return next(contact[1] for contact in rows.contacts if contact[2] == mail)


def _when(rng: np.random.Generator) -> dict[str, str]:
    return {"day": _one(rng, DAYS), "time": f"{int(rng.integers(8, 18)):02}:{_one(rng, ('00', '15', '30', '45'))}"}


def _schedule(rows: Rows, rng: np.random.Generator) -> Draft:
    _, name, mail, _ = _one(rng, rows.contacts)
    taken = {meeting[1] for meeting in rows.meetings}
    title = _one(rng, [t for topic in TOPICS for end in MEETINGS if (t := f"{topic} {end}") not in taken])
    words = {"title": title, **_when(rng), "minutes": int(_one(rng, (15, 30, 45, 60)))}
    return Draft(
        {**words, "name": name}, [_call("find_contact", name=name), _call("schedule_meeting", attendee=mail, **words)]
    )


def _move(rows: Rows, rng: np.random.Generator) -> Draft:
    number, title, _, day, time, _ = _one(rng, rows.meetings)
    when = _when(rng)
    while (when["day"], when["time"]) == (day, time):
        when = _when(rng)
    calls = [_call("find_meetings", title=title), _call("move_meeting", meeting=number, **when)]
    return Draft({"title": title, **when}, calls)


def _cancel(rows: Rows, rng: np.random.Generator) -> Draft:
    number, title, *_ = _one(rng, rows.meetings)
    return Draft({"title": title}, [_call("find_meetings", title=title), _call("cancel_meeting", meeting=number)])


def _cancel_all(rows: Rows, rng: np.random.Generator) -> Draft:
    mail = _one(rng, rows.meetings)[2]
    name = _name(rows, mail)
    calls = [_call("find_contact", name=name), _call("find_meetings", attendee=mail)]
    calls += [_call("cancel_meeting", meeting=meeting[0]) for meeting in rows.meetings if meeting[2] == mail]
    return Draft({"name": name}, calls)


def _send(rows: Rows, rng: np.random.Generator) -> Draft:
    _, name, mail, _ = _one(rng, rows.contacts)
    words = {
        "subject": f"{_one(rng, TOPICS)} {_one(rng, ('meeting', 'plan', 'numbers', 'draft'))}",
        "body": _one(rng, ("Please send it by {}.", "I need it on {}.", "Are you free on {}?")).format(_one(rng, DAYS)),
    }
    return Draft({**words, "name": name}, [_call("find_contact", name=name), _call("send_mail", to=mail, **words)])


def _forward(rows: Rows, rng: np.random.Generator) -> Draft:
    number, _, sender, _, subject, _ = _one(rng, rows.mails)
    _, name, mail, _ = _one(rng, [contact for contact in rows.contacts if contact[2] != sender])
    calls = [_call("find_contact", name=name), _call("find_mail", subject=subject)]
    return Draft({"subject": subject, "name": name}, [*calls, _call("forward_mail", mail=number, to=mail)])


def _delete(rows: Rows, rng: np.random.Generator) -> Draft:
    number, _, _, _, subject, _ = _one(rng, rows.mails)
    return Draft({"subject": subject}, [_call("find_mail", subject=subject), _call("delete_mail", mail=number)])


def _assign(rows: Rows, rng: np.random.Generator) -> Draft:
    number, title, before, _ = _one(rng, rows.tasks)
    _, name, mail, _ = _one(rng, [contact for contact in rows.contacts if contact[2] != before])
    calls = [_call("find_contact", name=name), _call("find_tasks", title=title)]
    return Draft({"title": title, "name": name}, [*calls, _call("update_task", task=number, assignee=mail)])


def _close(rows: Rows, rng: np.random.Generator) -> Draft:
    number, title, *_ = _one(rng, [task for task in rows.tasks if task[3] == "open"])
    return Draft({"title": title}, [_call("find_tasks", title=title), _call("update_task", task=number, status="done")])


def _close_all(rows: Rows, rng: np.random.Generator) -> Draft:
    mail = _one(rng, [task for task in rows.tasks if task[3] == "open"])[2]
    name = _name(rows, mail)
    calls = [_call("find_contact", name=name), _call("find_tasks", assignee=mail, status="open")]
    mine = [task for task in rows.tasks if task[2] == mail and task[3] == "open"]
    return Draft({"name": name}, [*calls, *(_call("update_task", task=task[0], status="done") for task in mine)])


def _new_company(rows: Rows, rng: np.random.Generator) -> Draft:
    number, name, _, before = _one(rng, rows.contacts)
    company = _one(rng, [c for c in COMPANIES if c != before])
    calls = [_call("find_contact", name=name), _call("update_contact", contact=number, company=company)]
    return Draft({"name": name, "company": company}, calls)


def _ask_address(rows: Rows, rng: np.random.Generator) -> Draft:
    _, name, mail, _ = _one(rng, rows.contacts)
    return Draft({"name": name}, [_call("find_contact", name=name)], {"mail": mail})


def _ask_time(rows: Rows, rng: np.random.Generator) -> Draft:
    _, title, _, day, time, _ = _one(rng, rows.meetings)
    return Draft({"title": title}, [_call("find_meetings", title=title)], {"day": day, "time": time})


def _ask_count(rows: Rows, rng: np.random.Generator) -> Draft:
    _, name, mail, _ = _one(rng, rows.contacts)
    count = sum(task[2] == mail and task[3] == "open" for task in rows.tasks)
    calls = [_call("find_contact", name=name), _call("find_tasks", assignee=mail, status="open")]
    return Draft({"name": name}, calls, {"number": str(count)})


TEMPLATES: dict[str, Template] = {
    "schedule": Template(
        (
            "Schedule the meeting '{title}' with {name} on {day} at {time}, {minutes} minutes.",
            "Please set up '{title}' with {name}: {day}, {time}, for {minutes} minutes.",
            "I want to meet {name} on {day} at {time} for {minutes} minutes. Call it '{title}'.",
        ),
        _schedule,
    ),
    "move": Template(
        (
            "Move the meeting '{title}' to {day} at {time}.",
            "'{title}' has to be on {day} at {time} instead.",
            "Please put the meeting '{title}' on {day}, {time}.",
        ),
        _move,
    ),
    "cancel": Template(
        ("Cancel the meeting '{title}'.", "'{title}' will not take place: remove it from the calendar."), _cancel
    ),
    "cancel_all": Template(
        ("Cancel all my meetings with {name}.", "{name} is ill this week. Remove every meeting with them."), _cancel_all
    ),
    "send": Template(
        (
            "Send {name} a mail with the subject '{subject}' and the text '{body}'",
            "Write to {name}. Subject: '{subject}'. Text: '{body}'",
        ),
        _send,
    ),
    "forward": Template(
        ("Forward the mail '{subject}' to {name}.", "{name} should see the mail '{subject}': forward it."), _forward
    ),
    "delete": Template(("Delete the mail '{subject}'.", "I do not need the mail '{subject}' any more."), _delete),
    "assign": Template(
        ("Assign the task '{title}' to {name}.", "{name} takes over the task '{title}'. Please record that."), _assign
    ),
    "close": Template(("Mark the task '{title}' as done.", "The task '{title}' is finished. Close it."), _close),
    "close_all": Template(
        ("Mark all open tasks of {name} as done.", "{name} has finished everything: close their open tasks."),
        _close_all,
    ),
    "new_company": Template(
        ("{name} works for {company} now. Update the contact.", "Change the company of {name} to {company}."),
        _new_company,
    ),
    "ask_address": Template(
        ("What is the mail address of {name}?", "Tell me at which address I can write to {name}."), _ask_address
    ),
    "ask_time": Template(
        ("On which day and at what time is the meeting '{title}'?", "When does '{title}' begin? Give day and time."),
        _ask_time,
    ),
    "ask_count": Template(
        ("How many open tasks does {name} have? Answer with a number.", "Count the open tasks of {name}, in digits."),
        _ask_count,
    ),
}
"""Templates by name."""
