"""The world of the workplace: contacts, meetings, mail and tasks in a small database, made from a seed."""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
ME = "me@home.example"
"""The address of the person the policy works for."""

TABLES = {
    "contacts": ("name", "mail", "company"),
    "meetings": ("title", "attendee", "day", "time", "minutes"),
    "mails": ("folder", "sender", "recipient", "subject", "body"),
    "tasks": ("title", "assignee", "status"),
}
"""Columns of each table, after ``id``."""

FIRST = "Ada Ben Cleo Dan Eva Finn Gita Hugo Iris Jon Kim Leo Mia Nils Olga Paul Rosa Sam Tess Uma".split()  # noqa: SIM905
LAST = "Abt Berg Cole Dietz Evans Ford Grant Hale Ito Jung Kern Lind Moss Nash Ober Park Quist Roth Stein Voss".split()  # noqa: SIM905
COMPANIES = ("Acme", "Boreal", "Cobalt", "Delta", "Ember", "Fjord")
TOPICS = (
    "Budget Hiring Roadmap Security Launch Design Travel Training Sales Office Quality Press Server Contract Survey "  # noqa: SIM905
    "Webshop Pricing Safety Archive Supplier".split()
)
MEETINGS = ("review", "planning", "workshop", "sync", "kick-off", "interview")
SUBJECTS = ("question", "report", "update", "invoice", "agenda", "minutes")
WORK = ("Draft the", "Check the", "Print the", "Present the", "Rewrite the", "Publish the")
BODIES = ("See below.", "Please have a look.", "Any news?", "It is done.", "Can we talk?")


class Rows(NamedTuple):
    """What a world begins with: tuples of ``id`` and the columns of :data:`TABLES`."""

    contacts: tuple[tuple[Any, ...], ...]
    meetings: tuple[tuple[Any, ...], ...]
    mails: tuple[tuple[Any, ...], ...]
    tasks: tuple[tuple[Any, ...], ...]


@lru_cache(maxsize=512)
def make_rows(seed: int) -> Rows:
    """The rows of a world; names, titles and subjects are each unique in it.

    Args:
        seed: equal seeds give equal worlds.
    """
    rng = np.random.default_rng([seed, 0x5EED])

    def some(options: Any, count: int) -> list[Any]:
        return [options[int(i)] for i in rng.permutation(len(options))[:count]]

    def one(options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    def titles(ends: Any, count: int) -> list[str]:
        return [f"{topic} {one(ends)}" for topic in some(TOPICS, count)]

    names = [f"{first} {last}" for first, last in zip(some(FIRST, 8), some(LAST, 8), strict=True)]
    contacts = []
    for number, name in enumerate(names, 1):
        company = one(COMPANIES)
        contacts.append((number, name, address_of(name, company), company))
    mails = [contact[2] for contact in contacts]
    meetings = [
        (number, title, one(mails), one(DAYS), f"{int(rng.integers(8, 18)):02}:{one(('00', '30'))}", one((30, 45, 60)))
        for number, title in enumerate(titles(MEETINGS, 8), 1)
    ]
    inbox = [
        (number, "inbox", one(mails), ME, subject, one(BODIES)) for number, subject in enumerate(titles(SUBJECTS, 8), 1)
    ]
    tasks = [
        (number, f"{one(WORK)} {topic.lower()} plan", one(mails), "open" if number < 4 else one(("open", "done")))
        for number, topic in enumerate(some(TOPICS, 8), 1)
    ]
    return Rows(tuple(contacts), tuple(meetings), tuple(inbox), tuple(tasks))


def address_of(name: str, company: str) -> str:
    """The mail address of a person of a company."""
    return f"{name.lower().replace(' ', '.')}@{company.lower()}.example"


class World:
    """The database of one episode. One thread at a time may use it.

    Args:
        rows: what it begins with.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.first_new = {table: len(values) + 1 for table, values in zip(TABLES, rows, strict=True)}
        # An episode moves between the threads of a pool, but is never in two at once.
        self._database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        for table, values in zip(TABLES, rows, strict=True):
            columns = TABLES[table]
            kinds = ", ".join(f"{c} {'INTEGER' if c == 'minutes' else 'TEXT'} NOT NULL" for c in columns)
            # AUTOINCREMENT gives no number twice, so a row that is new never looks like one that was there.
            self._database.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY AUTOINCREMENT, {kinds})")
            marks = ", ".join("?" * (len(columns) + 1))
            self._database.executemany(f"INSERT INTO {table} VALUES ({marks})", values)

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a statement of ours with bound values; what a policy wrote is never part of ``sql``."""
        return self._database.execute(sql, values).fetchall()

    def add(self, table: str, *values: Any) -> int:
        """Add a row and return its number."""
        columns = TABLES[table]
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        return int(self._database.execute(sql, values).lastrowid or 0)

    def state(self) -> dict[str, list[tuple[Any, ...]]]:
        """All rows of all tables, sorted; rows that are new have number 0, since their order is of no matter."""
        found = {}
        for table in TABLES:
            new = self.first_new[table]
            rows = self.query(f"SELECT * FROM {table}")
            found[table] = sorted((0 if row[0] >= new else row[0], *row[1:]) for row in rows)
        return found

    def close(self) -> None:
        """Forget it all; it may be closed twice."""
        self._database.close()
