"""What a writer and a judge are asked. The paper's prompts are not public; these are ours.

Paper: arXiv:2511.10289, MF-Skills: a language model that knows theory merges initial captions and metadata into
captions of six aspects and questions on five skills.
"""

ASPECTS = {
    "facts": "tempo in beats per minute, key and metre",
    "production": "instruments, how they are played and how the recording is mixed",
    "lyrics": "the voice, the words and what they are about",
    "structure": "sections, their order, and how the dynamics move through them",
    "theory": "chords and how they progress in the key",
    "mood": "overall mood, genre and culture",
}
"""The six aspects of a caption, as they are asked for."""

SKILLS = {
    "temporal": "temporal understanding: what comes when, and how it changes",
    "attribute": "attributes: key, tempo, metre, instruments, timbre",
    "harmony": "harmony and theory: chords, progressions, cadences",
    "lyrics": "lyrics and voice: what is sung, and how",
    "structure": "comparison and structure: how sections or features differ",
}
"""The five skills that questions ask for; a question's task is its skill."""

FACTS = """\
What is known of a piece of music of {seconds:.0f} seconds. Measured values can be wrong where their confidence is low;
values by "user" are right.
{facts}
"""

CAPTION = """\
You are a music theorist who describes recordings for students.

{facts}
Write one description of this piece in flowing English, 100 to 450 words, that covers what the facts support of:
{aspects}
Say nothing that the facts contradict, and invent nothing: no lyrics, instruments or sections that are not named above.
Give the tempo as a number with "bpm", keys as in "E flat major", chords as in "E flat:maj" and "C:min".

Answer with JSON alone: {{"caption": "…"}}
"""

QUESTIONS = """\
You are a music theorist who examines students by ear.

{facts}
Write {count} multiple-choice questions about this piece that need listening, spread over these skills:
{skills}
Each has four options of one kind and of like length, one of them right. Who does not hear the piece must not be able to
tell which: no question gives its answer away, and wrong options are as likely in general. Ask only for what the facts
settle. Leave a skill out where the facts say nothing of it. Chords are written as in "E flat:maj" and "C:min".

Answer with JSON alone:
{{"questions": [{{"skill": "{skill_names}", "question": "…",
  "options": ["…", "…", "…", "…"], "answer": "the right option"}}]}}
"""

JUDGE = """\
You check teaching material about music against what is known of the piece.

{facts}
Material:
{item}

Score from 0 (wrong or useless) to 10 (right, clear, and needs the music): does every statement agree with the facts, is
the answer right, is nothing invented?

Answer with JSON alone: {{"score": 0}}
"""

THOUGHTS = """\
You are a music theorist who thinks aloud while listening.

{facts}
Question: {question}
Answer: {answer}

Write the chain of thought that leads from what is heard to this answer: short sentences, one observation or inference
each, at most twelve, that use the facts above as if they were heard. Do not mention the facts, a record or confidence.

Answer with JSON alone: {{"steps": ["…", "…"]}}
"""
