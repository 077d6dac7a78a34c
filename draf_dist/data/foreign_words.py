"""What a sample of a foreign tar says in words: its site, its label, its subject."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from draf_dist.data.encode import UnfitError
from draf_dist.sources.webdataset_card import META_MEMBER, WebDatasetCard, WordCard

# Extension -> content, of the members that hold words.
Texts = Mapping[str, bytes]
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
# As programs write an index: "02" is more likely the name of something.
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


class Words:
    """Reads words by a card. extensions: of the members that it needs."""

    def __init__(self, card: WebDatasetCard) -> None:
        self._card, self._label = card, card.chosen_label
        self._site_of = {word: site for site in card.sites.groups for word in card.sites.words(site)}
        self._sites = card.sites.names()
        # Of classes that are numbers themselves an index would silently be another class: grade "0" among 1, 2 and 3.
        self._may_be_index = not any(_NUMBER.fullmatch(name) for name in (*self._label.classes, *self._label.values))
        self.extensions = frozenset(META_MEMBER if word.path else word.member for word in card.words if word.path or word.member)

    def site(self, key: str, texts: Texts) -> int:
        """The index of the sample's site.

        Raises:
            UnfitError: nothing says it, or what says it is no site of the card.
        """
        card = self._card.sites
        if card.constant is not None:
            return 0
        word = _word(card, key, texts)
        if word is None:
            raise UnfitError("no site", "nothing stands where the card looks for it")
        site = self._site_of.get(word, card.other)
        if site is None:
            raise UnfitError("unknown site", f"it is in none of the groups of {', '.join(self._sites)}")
        return self._sites.index(site)

    def label(self, key: str, texts: Texts) -> int:
        """The index of the sample's class.

        Raises:
            UnfitError: nothing says it, or what says it is no class of the card.
        """
        card, classes = self._label, self._label.classes
        word = _word(card, key, texts)
        if word is None:
            raise UnfitError("no label", "nothing stands where the card looks for it")
        name = card.values.get(word, word)
        if name in classes:
            return classes.index(name)
        if self._may_be_index and _INDEX.fullmatch(name) and int(name) < len(classes):
            return int(name)
        or_index = f", nor a number below {len(classes)}" if self._may_be_index else "; where these are numbers none is an index"
        raise UnfitError("unknown label", f"it is none of {', '.join(classes)}{or_index}")

    def subject(self, key: str, texts: Texts) -> str | None:
        """What names the sample's subject; None where the card says that everyone has one sample.

        Raises:
            UnfitError: nothing says it.
        """
        if self._card.subject is None:
            return None
        word = _word(self._card.subject, key, texts)
        if word is None:
            raise UnfitError("no subject", "nothing stands where the card looks for it")
        return word


def _word(card: WordCard, key: str, texts: Texts) -> str | None:
    """The word without blanks at its ends; None where there is none."""
    if card.key_until is not None:
        before, separator, _ = key.partition(card.key_until)
        return before.strip() or None if separator else None
    if card.member is not None:
        return _plain(texts.get(card.member, b""))
    value: Any = _json(texts[META_MEMBER]) if META_MEMBER in texts else None
    for name in card.path:
        value = value.get(name) if isinstance(value, dict) else None
    return _as_word(value)


def _plain(content: bytes) -> str | None:
    try:
        return content.decode().strip() or None
    except UnicodeDecodeError as error:
        raise UnfitError("bad text", "a member that should hold a word is not UTF-8") from error


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnfitError("bad json", f"it can't be read ({type(error).__name__})") from error


def _as_word(value: Any) -> str | None:
    """Numbers as a person writes them: 1 and 1.0 are the same. None for null, and for NaN, which pandas writes in its place."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    raise UnfitError("bad json", "a list or an object where a word should stand")
