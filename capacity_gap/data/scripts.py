"""Which characters text in Latin letters may hold: none of them may be in the new tokens of a second script.

Punctuation that scripts share counts as Latin too. English prose is full of “ ” ’ — …, and a token that holds one of
them would change how it is read, while the second script loses little: a tokenizer of English text has tokens for them.
"""

import re

# Code points that text in Latin letters may hold: none of them is in a new token.
SHARED = (
    (0x0000, 0x036F),  # ASCII, Latin letters, phonetic ones, accents
    (0x1AB0, 0x1AFF),  # more accents
    (0x1D00, 0x1EFF),  # phonetic letters, accents, the Latin letters of Vietnamese
    (0x2000, 0x2BFF),  # punctuation, currencies, letterlike signs, arrows, mathematics, shapes, dingbats
    (0x2C60, 0x2C7F),  # Latin
    (0x2E00, 0x2E7F),  # more punctuation
    (0xA700, 0xA7FF),  # tone marks, Latin
    (0xAB30, 0xAB6F),  # Latin
    (0xFB00, 0xFB06),  # ligatures
    (0xFE00, 0xFE0F),  # selectors of variants, as of emoji
    (0xFE20, 0xFE2F),  # half marks
    (0xFEFF, 0xFEFF),  # the mark of byte order
    (0xFFF9, 0xFFFF),  # the character that replaces unreadable ones
    (0x1D400, 0x1D7FF),  # mathematical letters
    (0x1F000, 0x1FBFF),  # emoji and other pictures
    (0xE0000, 0xE01EF),  # tags and selectors
)
OTHER_SCRIPT = re.compile("[^" + "".join(f"{chr(a)}-{chr(b)}" for a, b in SHARED) + "]+")


def is_shared(start: bytes) -> bool:
    """Whether a character whose UTF-8 begins with these bytes may be in Latin text."""
    if not start:
        return False
    size = 1 + sum(start[0] >= lead for lead in (0xC0, 0xE0, 0xF0))
    code = start[0] & (0x7F, 0x1F, 0x0F, 0x07)[size - 1]
    for byte in start[1:]:
        code = code << 6 | byte & 0x3F
    left = 6 * (size - len(start))
    first, last = code << left, ((code + 1) << left) - 1
    return any(low <= last and first <= high for low, high in SHARED)
