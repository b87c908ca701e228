"""The tools of the workplace. What a policy writes reaches the database as a bound value, never as SQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bestiary.shared.rl.environments.tool_environment import Tool, ToolError
from bestiary.shared.rl.environments.workplace_world import DAYS, ME, World

TEXT = {"type": "string", "minLength": 1, "maxLength": 200}
NUMBER = {"type": "integer", "minimum": 1, "maximum": 1_000_000_000}
DAY = {"type": "string", "enum": list(DAYS)}
TIME = {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$", "maxLength": 5, "description": "HH:MM"}
MINUTES = {"type": "integer", "minimum": 5, "maximum": 480}
STATUS = {"type": "string", "enum": ["open", "done"]}


def find_contact(world: World, name: str) -> str:
    """Contacts by a part of name, address or company."""
    where = "instr(lower(name || ' ' || mail || ' ' || company), lower(?))"
    return _listed(world.query(f"SELECT id, name, mail, company FROM contacts WHERE {where} ORDER BY id", (name,)))


def update_contact(world: World, contact: int, company: str) -> str:
    """Another company for a contact."""
    _row(world, "contacts", contact)
    world.query("UPDATE contacts SET company = ? WHERE id = ?", (company.strip(), contact))
    return "done"


def find_meetings(world: World, title: str = "", attendee: str = "", day: str = "") -> str:
    """Meetings by what is given."""
    return _found(world, "meetings", "title, day, time, minutes, attendee", title=title, attendee=attendee, day=day)


def schedule_meeting(world: World, title: str, attendee: str, day: str, time: str, minutes: int) -> str:
    """A new meeting."""
    row = world.add("meetings", title.strip(), _address(world, attendee), day, time, int(minutes))
    return f"done, it is meeting {row}"


def move_meeting(world: World, meeting: int, day: str, time: str) -> str:
    """Another day and time for a meeting."""
    _row(world, "meetings", meeting)
    world.query("UPDATE meetings SET day = ?, time = ? WHERE id = ?", (day, time, meeting))
    return "done"


def cancel_meeting(world: World, meeting: int) -> str:
    """Remove a meeting."""
    _row(world, "meetings", meeting)
    world.query("DELETE FROM meetings WHERE id = ?", (meeting,))
    return "done"


def find_mail(world: World, subject: str = "", sender: str = "") -> str:
    """Mail by what is given."""
    return _found(world, "mails", "folder, sender, recipient, subject, body", subject=subject, sender=sender)


def send_mail(world: World, to: str, subject: str, body: str) -> str:
    """A mail to a contact."""
    row = world.add("mails", "sent", ME, _address(world, to), subject.strip(), body.strip())
    return f"done, it is mail {row}"


def forward_mail(world: World, mail: int, to: str) -> str:
    """A copy of a mail to a contact."""
    *_, subject, body = _row(world, "mails", mail)
    row = world.add("mails", "sent", ME, _address(world, to), f"Fwd: {subject}", body)
    return f"done, it is mail {row}"


def delete_mail(world: World, mail: int) -> str:
    """Remove a mail."""
    _row(world, "mails", mail)
    world.query("DELETE FROM mails WHERE id = ?", (mail,))
    return "done"


def find_tasks(world: World, title: str = "", assignee: str = "", status: str = "") -> str:
    """Tasks by what is given."""
    return _found(world, "tasks", "title, assignee, status", title=title, assignee=assignee, status=status)


def update_task(world: World, task: int, assignee: str = "", status: str = "") -> str:
    """Another assignee or status for a task."""
    _, _, before, was = _row(world, "tasks", task)
    who = _address(world, assignee) if assignee else before
    world.query("UPDATE tasks SET assignee = ?, status = ? WHERE id = ?", (who, status or was, task))
    return "done"


def _listed(rows: list[tuple[Any, ...]]) -> str:
    return "\n".join(f"{row[0]}: {', '.join(str(v) for v in row[1:])}" for row in rows[:20]) or "nothing found"


def _found(world: World, table: str, columns: str, **parts: str) -> str:
    """Rows whose columns (named here, not by a policy) hold the given parts; case is of no matter."""
    given = {column: part for column, part in parts.items() if part}
    where = " AND ".join(f"instr(lower({column}), lower(?))" for column in given) or "1"
    return _listed(world.query(f"SELECT id, {columns} FROM {table} WHERE {where} ORDER BY id", tuple(given.values())))


def _row(world: World, table: str, number: int) -> tuple[Any, ...]:
    rows = world.query(f"SELECT * FROM {table} WHERE id = ?", (number,))
    if not rows:
        raise ToolError(f"there is no {table[:-1]} {number}")
    return rows[0]


def _address(world: World, mail: str) -> str:
    rows = world.query("SELECT mail FROM contacts WHERE mail = lower(?)", (mail.strip(),))
    if not rows:
        raise ToolError(f"no contact has the address {mail!r}")
    return rows[0][0]


def _tool(function: Callable[..., str], description: str, required: str, least: int = 0, **properties: Any) -> Tool:
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required.split()}
    schema |= {"minProperties": least} if least else {}
    schema |= {"additionalProperties": False}
    return Tool(function.__name__, description, schema, lambda world, arguments: function(world, **arguments))


TOOLS: tuple[Tool, ...] = (
    _tool(find_contact, "Contacts by a part of their name, address or company.", "name", name=TEXT),
    _tool(update_contact, "Change the company of a contact.", "contact company", contact=NUMBER, company=TEXT),
    _tool(find_meetings, "Meetings; all filters are optional.", "", title=TEXT, attendee=TEXT, day=DAY),
    _tool(
        schedule_meeting,
        "Schedule a meeting with a contact; attendee is an address.",
        "title attendee day time minutes",
        title=TEXT,
        attendee=TEXT,
        day=DAY,
        time=TIME,
        minutes=MINUTES,
    ),
    _tool(move_meeting, "Move a meeting.", "meeting day time", meeting=NUMBER, day=DAY, time=TIME),
    _tool(cancel_meeting, "Cancel a meeting.", "meeting", meeting=NUMBER),
    _tool(find_mail, "Mail; all filters are optional, sender is an address.", "", subject=TEXT, sender=TEXT),
    _tool(send_mail, "Send a mail to the address of a contact.", "to subject body", to=TEXT, subject=TEXT, body=TEXT),
    _tool(forward_mail, "Forward a mail to the address of a contact.", "mail to", mail=NUMBER, to=TEXT),
    _tool(delete_mail, "Delete a mail.", "mail", mail=NUMBER),
    _tool(find_tasks, "Tasks; all filters are optional.", "", title=TEXT, assignee=TEXT, status=STATUS),
    _tool(
        update_task,
        "Give a task to the address of a contact, or set its status, or both.",
        "task",
        2,
        task=NUMBER,
        assignee=TEXT,
        status=STATUS,
    ),
)
"""All of them."""
