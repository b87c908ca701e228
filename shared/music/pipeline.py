"""From a folder of music to questions, descriptions and thoughts that ``dataset=audio_qa_jsonl`` reads.

Paper: arXiv:2511.10289, MF-Skills: 1. initial captions of 30 s segments, 2. metadata, 3. captions and questions, 4. a
filter; then MF-Think's chains where they are asked for.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.audio.files import SUFFIXES, duration, read_audio
from bestiary.shared.core.errors import BadDataError, ConfigError, UserError
from bestiary.shared.data.audio_qa import RATES
from bestiary.shared.data.user_files import Header, NoHeader, audio_headers, first_faults
from bestiary.shared.music.extract import check_tools, extract
from bestiary.shared.music.filter import fault
from bestiary.shared.music.records import Record, record_from
from bestiary.shared.music.rows import Rows
from bestiary.shared.music.think import check_chain
from bestiary.shared.music.write import Item, Written

STAGES = ("captions", "metadata", "written", "kept")
"""Files of the stages, in order, each with a row a piece."""

SEGMENT_S = 30.0
"""Length of what an initial caption describes; the paper's."""

LONGEST_S = 1200.0
"""The longest clip that ``dataset=audio_qa_jsonl`` takes, unless it is told otherwise."""

BESIDE = (".txt", ".json")
"""Endings of what lies beside a piece: its words, and what the user knows of it."""

Writer = Callable[[Record, Sequence[str], str], Written]
Listener = Callable[[np.ndarray, int], str]


@dataclass
class Report:
    """What came of a run: files found, those that could not be used and why, what was made, what was dropped."""

    files: int = 0
    unusable: dict[str, str] = field(default_factory=dict)
    made: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    thoughts: int = 0
    out: Path = Path()

    def __str__(self) -> str:
        lines = [self.found()]
        total = sum(self.made.values())
        kinds = ", ".join(f"{count} {task}" for task, count in sorted(self.made.items()))
        lines.append(f"{total} rows made" + (f": {kinds}" if kinds else ""))
        if self.thoughts:
            lines.append(f"{self.thoughts} of them with thoughts")
        lines += [f"{count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        end = f"written to {self.out}: dataset=audio_qa_jsonl dataset.path={self.out}"
        return "\n".join([*lines, end if total else f"{self.out} is empty: there is nothing to train on"])

    def found(self) -> str:
        """How many files there are, and which could not be used."""
        head = f"{self.files} audio files, {len(self.unusable)} of them unusable"
        return "\n".join([head, first_faults(list(self.unusable.values()))]) if self.unusable else head


class Pipeline:
    """Makes questions about all music in a folder; whatever interrupts it, the next run goes on from there.

    Each stage's rows are on the disk one by one; a piece that has a row is not done again. A file that cannot be used
    is passed over and reported; the next run looks at it again. ``audio_qa.jsonl`` is made of the last stage's rows at
    the end, as a whole, in the order of names.

    Args:
        folder: searched for audio, folders inside it too.
        out: folder of the results.
        writer: of stage 3.
        listener: of stage 1, or None for no initial captions.
        judge: of stage 4, beside the rules: (record, item, initial captions) to why an item is dropped, or None.
        thinker: (record, item, initial captions) to a chain of thought, which is checked; None for no thoughts.
        tools: of stage 2, see :func:`~bestiary.shared.music.extract.extract`.
        workers: pieces at once, in processes for stage 2 and threads for 3 and 4.
        settings: what the rows depend on, as plain data; a folder begun with others is refused.
        say: told of progress.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        writer: Writer,
        listener: Listener | None = None,
        judge: Callable[[Item, Record, Sequence[str]], str | None] | None = None,
        thinker: Callable[[Record, Item, Sequence[str]], str | None] | None = None,
        tools: Sequence[str] | None = None,
        workers: int = 1,
        settings: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        if workers < 1:
            raise ConfigError(f"workers is 1 or more, not {workers}")
        self.folder, self.out, self.workers, self.say = folder, out, workers, say
        self.writer, self.listener, self.judge, self.thinker = writer, listener, judge, thinker
        self.tools = check_tools(tools)
        self.settings = dict(settings or {})

    def run(self) -> Report:
        """Do what is not done yet.

        Raises:
            BadDataError: without any usable audio, or for audio that changed since its rows were made.
            ConfigError: for other settings than those the folder was begun with, a folder that another run fills, or
                one inside the music.
        """
        if not self.folder.is_dir():
            raise BadDataError(f"{self.folder} is no folder")
        music, results = self.folder.resolve(), self.out.resolve()
        if music in (results, *results.parents):
            # settings.json would be what is known of settings.wav.
            raise ConfigError(f"{self.out} is inside {self.folder}: give an --out that is not")
        report, names = self._look()
        self._some(names, report)  # before there is a folder that a right --folder could not go on with
        self.out.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._same_settings()
            rows = {stage: Rows(self.out / f"{stage}.jsonl") for stage in STAGES}
            self._unchanged(rows, names)
            if self.listener is not None:
                self._stage(rows["captions"], names, self._listen, None, report)
            pool = _processes(self.workers) if self.workers > 1 else None
            jobs = {name: (str(self.folder / name), self.tools) for name in names}
            self._stage(rows["metadata"], names, _measured, pool, report, jobs)
            names = self._some(names, report)
            for stage, work in (("written", self._write), ("kept", self._keep)):
                pool = ThreadPoolExecutor(self.workers) if self.workers > 1 else None
                jobs = {name: (name, rows) for name in names}
                self._stage(rows[stage], names, work, pool, report, jobs)
            self._publish(rows, self._some(names, report), report)
        return report

    # ---------------------------------------------------------------------------------------------- stages

    def _stage(
        self,
        rows: Rows,
        names: Sequence[str],
        work: Callable[..., dict[str, Any]],
        pool: Executor | None,
        report: Report,
        jobs: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        """Add a row for every name that has none. BadDataError of a piece is reported; any other error ends the run."""
        todo = [name for name in names if name not in rows and name not in report.unusable]
        results = self._results(work, todo, pool, jobs, self.workers)
        for number, (name, result) in enumerate(results, len(names) - len(todo) + 1):
            if isinstance(result, BadDataError):
                report.unusable[name] = str(result)
            else:
                rows.add({"id": name, **result})
            if number % 50 == 0 or number == len(names):
                self.say(f"{rows.path.stem}: {number} of {len(names)}")

    @staticmethod
    def _results(
        work: Callable[..., dict[str, Any]],
        todo: Sequence[str],
        pool: Executor | None,
        jobs: Mapping[str, tuple[Any, ...]] | None,
        workers: int,
    ) -> Iterator[tuple[str, Any]]:
        def arguments(name: str) -> tuple[Any, ...]:
            return (name,) if jobs is None else jobs[name]

        if pool is None:
            for name in todo:
                try:
                    yield name, work(*arguments(name))
                except BadDataError as error:
                    yield name, error
            return
        try:
            waiting = iter(todo)
            # Enough to keep all workers busy; a row is on the disk soon after its piece is done.
            first = itertools.islice(waiting, 2 * workers)
            running = {pool.submit(work, *arguments(name)): name for name in first}
            while running:
                done, _ = wait(running, return_when="FIRST_COMPLETED")
                for future in done:
                    name = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenExecutor):
                        raise UserError("a worker died, of lack of memory perhaps: run it again with fewer --workers")
                    if error is not None and not isinstance(error, BadDataError):
                        raise error
                    yield name, error or future.result()
                    for later in itertools.islice(waiting, 1):
                        running[pool.submit(work, *arguments(later))] = later
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _listen(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        found, length, said = stamp(path, ()), duration(path), []
        for start in np.arange(0.0, length, SEGMENT_S):
            end = min(length, float(start) + SEGMENT_S)
            if end - start >= 1.0 or not said:
                said.append(self.listener(read_audio(path, 16000, float(start), end), 16000))  # type: ignore[misc]
        return {"stamp": found, "captions": said}

    def _write(self, name: str, rows: Mapping[str, Rows]) -> dict[str, Any]:
        written = self.writer(self._record(rows, name), self._captions(rows, name), name)
        return {"items": [item.to_json() for item in written.items], "dropped": dict(written.dropped)}

    def _keep(self, name: str, rows: Mapping[str, Rows]) -> dict[str, Any]:
        record, captions = self._record(rows, name), self._captions(rows, name)
        items, dropped = [], Counter(rows["written"][name]["dropped"])
        for item in (Item(**values) for values in rows["written"][name]["items"]):
            reason = fault(item, record, self.judge, captions)
            if reason is not None:
                dropped[f"{'caption' if item.task == 'caption' else 'question'}: {reason}"] += 1
                continue
            if self.thinker is not None:
                chain = self.thinker(record, item, captions)
                item.think = None if chain is None else check_chain(chain, record).text
                if item.think is None:
                    dropped["thoughts: none" if chain is None else "thoughts: too many wrong steps"] += 1
            items.append(item.to_json())
        return {"items": items, "dropped": dict(dropped)}

    @staticmethod
    def _record(rows: Mapping[str, Rows], name: str) -> Record:
        return record_from(rows["metadata"][name]["record"], f"{rows['metadata'].path}: {name}")

    @staticmethod
    def _captions(rows: Mapping[str, Rows], name: str) -> list[str]:
        return rows["captions"][name]["captions"] if name in rows["captions"] else []

    # ---------------------------------------------------------------------------------------------- around them

    def _look(self) -> tuple[Report, list[str]]:
        """All audio by its path from the folder, and what of it cannot be used."""
        paths = [path for path in sorted(self.folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
        headers = audio_headers(path for path in paths if is_text(path))
        report, names = Report(len(paths), out=self.out / "audio_qa.jsonl"), []
        for path in paths:
            name = path.relative_to(self.folder).as_posix()
            names.append(name)
            reason = why_not(path, headers[path]) if path in headers else f"{str(path)!a}: its name is not UTF-8"
            if reason is not None:
                report.unusable[name] = reason
        return report, [name for name in names if name not in report.unusable]

    def _some(self, names: Sequence[str], report: Report) -> list[str]:
        """Those that can be used; BadDataError where there are none."""
        found = [name for name in names if name not in report.unusable]
        if not found:
            more = f"\n{report.found()}" if report.unusable else ""
            raise BadDataError(f"{self.folder} holds no usable audio ({', '.join(SUFFIXES)}){more}")
        return found

    def _unchanged(self, rows: Mapping[str, Rows], names: Sequence[str]) -> None:
        for made, beside in (rows["captions"], ()), (rows["metadata"], BESIDE):
            done = [name for name in names if name in made]
            changed = [name for name in done if made[name]["stamp"] != stamp(self.folder / name, beside)]
            if changed:
                raise BadDataError(
                    f"{len(changed)} of the files in {self.folder}, or what lies beside them, changed since "
                    f"{made.path} was made, for example {changed[0]}: give another --out, or delete {self.out}"
                )

    def _same_settings(self) -> None:
        file = self.out / "settings.json"
        ours = {"folder": str(self.folder.resolve()), **self.settings}
        if not file.exists():
            write_whole(file, json.dumps(ours, indent=2) + "\n")
            return
        try:
            theirs = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise BadDataError(f"{file} holds no settings ({error}): give another --out") from error
        differ = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if differ:
            was = ", ".join(f"{key} {theirs.get(key)!r} (now {ours.get(key)!r})" for key in differ)
            raise ConfigError(f"{self.out} was begun with {was}: give another --out, or the same settings")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder against another run; the lock goes with the process."""
        with open(self.out / "lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"another run is filling {self.out}: wait for it, or give another --out") from error
            yield

    def _publish(self, rows: Mapping[str, Rows], names: Sequence[str], report: Report) -> None:
        lines = []
        for name in names:
            kept = rows["kept"][name]
            report.dropped.update(kept["dropped"])
            meta = self._record(rows, name).metadata()
            audio = os.path.relpath(self.folder / name, self.out)
            for number, item in enumerate(kept["items"]):
                row = {"id": f"{name}#{number}", "audio": audio, **item, "meta": meta}
                report.made[item["task"]] += 1
                report.thoughts += bool(item["think"])
                lines.append(json.dumps({k: v for k, v in row.items() if v not in (None, [], {})}, ensure_ascii=False))
        write_whole(report.out, "".join(f"{line}\n" for line in lines))


def _measured(path: str, tools: Sequence[str] | None) -> dict[str, Any]:
    """Stage 2 of one file; it runs in a process of its own."""
    return {"stamp": stamp(Path(path)), "record": extract(path, tools).to_json()}


def _processes(count: int) -> Executor:
    """A pool of fresh processes, which end with this one even if it is killed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=_end_with, initargs=(os.getpid(),))


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_text(path: Path) -> bool:
    """Whether a path can be written into a file: a name may hold any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def why_not(path: Path, header: Header | NoHeader) -> str | None:
    """Why ``dataset=audio_qa_jsonl`` would refuse a file, and all others with it; None if it would not."""
    if isinstance(header, NoHeader):
        return header.text
    if header.frames <= 0:
        return f"{path} has no samples"
    if not RATES[0] <= header.rate <= RATES[1]:
        return f"{path} claims {header.rate} samples a second"
    if header.frames > LONGEST_S * header.rate:
        return f"{path} is {header.frames / header.rate:.0f} s long, more than {LONGEST_S:.0f}: cut it into parts"
    return None


def stamp(path: Path, beside: Sequence[str] = BESIDE) -> str:
    """Size and time of an audio file and of what lies beside it: other ones make another record."""
    there = [p for p in (path, *map(path.with_suffix, beside)) if p.is_file()]
    return " ".join(f"{p.suffix}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in there)


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and rename it."""
    aside = path.with_name(f"{path.name}.new")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)
