"""Writes captions of clips: full and vague ones, in many phrasings, some with filler, and a few wrong ones.

Vague and wrong captions make guidance matter: if a model can trust every word of every caption,
guidance has nothing to sharpen.
"""

from __future__ import annotations

import random
import re
import string

from builder.demo.world import COLOURS, DIRECTIONS, GROUNDS, OBJECTS, Clip

MEANINGS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "boat": ("boat", "sailboat", "ship", "yacht"),
    "ball": ("ball", "beachball", "sphere"),
    "kite": ("kite",),
    "left": ("left", "leftward", "leftwards"),
    "right": ("right", "rightward", "rightwards"),
    "up": ("up", "upward", "upwards", "rises", "rising", "climbs", "climbing", "ascends", "ascending"),
    "down": ("down", "downward", "downwards", "falls", "falling", "sinks", "sinking", "descends", "descending"),
    "sea": ("sea", "ocean", "water", "waves"),
    "field": ("field", "meadow", "grass", "hills"),
    "night": ("night", "midnight", "moonlight", "dark"),
    "large": ("large", "big", "huge"),
    "small": ("small", "little", "tiny"),
    "fast": ("fast", "quickly", "swiftly"),
    "slow": ("slow", "slowly", "gently"),
}
"""What a caption can say, and the words for it. Words of one meaning get nearly the same vector (text.py)."""

CHOICES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "direction": DIRECTIONS,
    "ground": GROUNDS,
}

VERBS = (
    *("moves", "moving", "goes", "going", "travels", "travelling", "heads", "heading", "drifts", "drifting"),
    *("glides", "gliding", "floats", "floating", "sails", "sailing", "rolls", "rolling", "flies", "flying"),
)
NOUNS = ("thing", "something", "object")
OPENINGS = (
    *("a video of", "a film of", "a short clip of", "a scene with", "an animation of"),
    *("please show me", "we see", "here is", "cartoon of"),
)
CLOSINGS = (
    *("beautiful", "cinematic", "high quality", "best quality", "smooth", "a calm scene", "very nice", "simple cartoon"),
    *("on a sunny day", "at sunset", "in the style of a picture book", "for children", "with a static camera"),
)
SMALL_WORDS = (
    *("a", "an", "the", "is", "and", "it", "its", "of", "in", "on", "at", "to", "by", "with", "from", "into"),
    *("over", "above", "across", "through", "under", "towards", "toward", "that", "this", "there", "one"),
    *("sky", "calm", "bright", "coloured", "colored"),
)

FILLER = tuple(sorted({*VERBS, *NOUNS, *SMALL_WORDS, *(w for phrase in (*OPENINGS, *CLOSINGS) for w in phrase.split())}))
"""Words that say nothing about the toy world."""


def caption(clip: Clip, rng: random.Random) -> str:
    """Return a caption: often incomplete, seldom wrong in a detail, never with filler that means something else."""
    said: dict[str, str] = {
        "object": clip.object,
        "colour": clip.colour,
        "direction": clip.direction,
        "ground": clip.ground,
    }
    for what in said:
        if rng.random() < 0.03:
            said[what] = rng.choice(CHOICES[what])
    if rng.random() < 0.12:  # one or two words
        keep = rng.sample(sorted(said), rng.choice((1, 2)))
        return _in_some_case(" ".join(_word(said[what], rng) for what in keep), rng)
    left_out = {what for what in said if rng.random() < 0.07}
    return phrase({what: word for what, word in said.items() if what not in left_out}, rng, _details(clip))


def understood(text: str) -> dict[str, str]:
    """Return the object, colour, direction and ground that a text names, each where it does."""
    words = set(re.findall(r"\w+", text.lower()))
    return {what: meaning for what, meanings in CHOICES.items() for meaning in meanings if words & set(MEANINGS[meaning])}


def _details(clip: Clip) -> dict[str, str]:
    """Return what can be said of the size and the speed; nothing where they are neither."""
    size = "large" if clip.radius > 0.23 else "small" if clip.radius < 0.19 else ""
    speed = "fast" if clip.travel > 0.5 else "slow" if clip.travel < 0.38 else ""
    return {"size": size, "speed": speed}


def phrase(said: dict[str, str], rng: random.Random, details: dict[str, str] | None = None) -> str:
    """Put meanings into a free phrase. `said`: object, colour, direction, ground, each where it is to be said."""
    details = details or {}
    size = _word(details["size"], rng) if details.get("size") and rng.random() < 0.15 else ""
    speed = _word(details["speed"], rng) if details.get("speed") and rng.random() < 0.15 else ""
    noun = _word(said["object"], rng) if "object" in said else rng.choice(NOUNS)
    colour = _word(said["colour"], rng) if "colour" in said else ""
    thing = f"{rng.choice(('a', 'a', 'the', 'one', ''))} {size} {colour} {noun}"
    verb = rng.choice(VERBS)
    motion = ""
    if "direction" in said:
        word = _word(said["direction"], rng)
        if word.endswith(("s", "ing")) and "ward" not in word:  # rises, sinking
            motion = f"{word} {speed}"
        elif word in ("left", "right"):
            motion = f"{verb} {speed} {rng.choice(('', '', 'to the', 'towards the'))} {word}"
        else:
            motion = f"{verb} {speed} {word}"
    place = ""
    if "ground" in said:
        word = _word(said["ground"], rng)
        where = rng.choice(("over the", "over the", "above the", "across the", "on a calm", "at the", "in the", "over a"))
        place = f"{where} {word}{' sky' if said['ground'] == 'night' and rng.random() < 0.5 else ''}"
    style = rng.random()
    if style < 0.55:
        text = f"{thing} {motion} {place}"
    elif style < 0.67:
        text = f"{place}{rng.choice((',', ''))} {thing} {motion}"
    elif style < 0.77:
        text = f"{motion}{rng.choice((',', ''))} {thing} {place}"
    elif style < 0.87:  # tags
        parts = [
            p for p in (f"{colour} {noun}", motion.split()[-1] if motion else "", place.split(" ", 2)[-1] if place else "") if p
        ]
        rng.shuffle(parts)
        text = ", ".join(parts)
    else:
        text = f"the {noun} {f'is {colour} and' if colour else ''} {motion} {place}"
    if rng.random() < 0.25:
        text = f"{rng.choice(OPENINGS)} {text}"
    if rng.random() < 0.25:
        text = f"{text}{rng.choice((',', '', '.'))} {rng.choice(CLOSINGS)}"
    if rng.random() < 0.2:
        words = text.split()
        words.insert(rng.randint(0, len(words)), _unknown_word(rng))
        text = " ".join(words)
    return _in_some_case(text, rng) + rng.choice(("", "", "."))


def _word(meaning: str, rng: random.Random) -> str:
    """Return a word for the meaning, the plainest one in half of the cases."""
    words = MEANINGS[meaning]
    return words[0] if rng.random() < 0.5 else rng.choice(words)


def _unknown_word(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 7)))


def _in_some_case(text: str, rng: random.Random) -> str:
    text = " ".join(text.split()).replace(" ,", ",").strip(" ,")
    return rng.choice((text, text, text, text[:1].upper() + text[1:], text[:1].upper() + text[1:], text.title(), text.upper()))
