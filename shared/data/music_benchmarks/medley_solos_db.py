"""Medley-solos-DB: solo instruments, and which one it is."""

from __future__ import annotations

from pathlib import Path

from bestiary.shared.data.music_benchmarks.benchmark import Benchmark, Item
from bestiary.shared.data.music_benchmarks.records import AudioFolder, among, fields, first_file, read_records

INSTRUMENTS = (
    "clarinet", "distorted electric guitar", "female singer", "flute", "piano", "tenor saxophone", "trumpet", "violin",
)  # fmt: skip
"""In the order of their ids."""

PROMPT = (
    "Which instrument plays in this music? Choose one of: clarinet, distorted electric guitar, female singer, flute, "
    "piano, tenor saxophone, trumpet, violin."
)
"""Ours: the set prescribes none, and published scores of language models do not name theirs."""


class MedleySolosDB(Benchmark):
    """Medley-solos-DB: clips of three seconds of one of eight instruments; 12,236 of the 21,572 are its test subset.

    The layout is the public one: ``Medley-solos-DB_metadata.csv`` with ``subset, instrument, instrument_id, song_id,
    uuid4``, in the folder or in ``annotation`` below it, and ``Medley-solos-DB_SUBSET-ID_UUID.wav`` anywhere below (an
    older release has ``.wav.wav``). The field names and the ids of instruments were read in programs that read the
    public file; the second ending is from memory.

    Clips of one song stand under ``meta["song"]``: they are no independent draws.

    Paper: Lostanlen and Cella, "Deep convolutional networks on the pitch spiral for musical instrument recognition",
    ISMIR 2016.

    Args:
        root: the folder.
        subset: ``test``, ``validation`` or ``training``, as the file has it; None for all. Nothing is trained on.
        prompt: what is asked.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.
    """

    name = "medley_solos_db"
    asks = ()
    names = {
        "subset": ("subset",),
        "instrument": ("instrument",),
        "instrument_id": ("instrument_id",),
        "song": ("song_id",),
        "id": ("uuid4",),
    }

    def __init__(
        self,
        root: str | Path,
        subset: str | None = "test",
        prompt: str = PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, prompt, audio, seed, rate, leave_out, request)
        self.subset = subset

    def source_file(self) -> Path | None:
        """The metadata."""
        name = "Medley-solos-DB_metadata.csv"
        return first_file(self.root, (name, f"annotation/{name}", f"annotations/{name}", "*metadata*.csv"))

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """All clips of the subset."""
        items = []
        rows = fields(read_records(file), self.names, tuple(self.names), file)
        for number, row in among(rows, "subset", self.subset, file):
            values = {key: str(value or "").strip() for key, value in row.items()}
            name, instrument = values["id"] or f"row {number}", values["instrument"]
            if instrument not in INSTRUMENTS or values["instrument_id"] != str(INSTRUMENTS.index(instrument)):
                told = f"its instrument {instrument!r} with the id {values['instrument_id']!r}"
                self.fault(name, f"{told} is none of the eight: {', '.join(INSTRUMENTS)}, 0 to 7")
                continue
            base = f"Medley-solos-DB_{values['subset']}-{values['instrument_id']}_{values['id']}"
            path = next((p for e in (".wav", ".wav.wav") if audio.find(p := f"{base}{e}")), f"{base}.wav")
            clips = self.clip(audio, name, path)
            if clips is not None:
                meta = {"task": "instrument", "labels": list(INSTRUMENTS), "song": values["song"]}
                items.append(Item(name, clips, self.prompt, instrument, "exact_text", meta))
        return items
