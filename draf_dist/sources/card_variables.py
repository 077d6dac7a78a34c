"""Variables of a card: where a series or table finds them, in which unit, what is plausible."""

from typing import Any, Literal

from pydantic import Field, model_validator

from draf_dist.schema.modality import VariableSpec
from draf_dist.sources.card_parts import CardPart, Name, SiteName

# One local code, several that mean the same, or one entry per site (null: this site does not record it).
Code = str | tuple[str, ...]
LocalCode = Code | dict[SiteName, Code | None]
LocalUnit = str | dict[SiteName, str]


class VariableCard(CardPart):
    """One variable of a series or table.

    code: the local code (long table) or column (wide table); default: the name. unit: what the export's numbers are in, where the
    unit column does not say; canonical: what the release stores (default: `unit`). range: plausible values in the canonical unit,
    both ends included; what lies outside is not observed, and counted. missing: numbers that mean "not known".
    values: strings -> numbers. molar_mass_g_mol: needed to go between mass and amount (mg/dL, mmol/L); valence: needed to go
    between mEq and mmol. aggregate: overrides that of the modality.
    categories: of type `categorical`, in the order of their codes, those that the cells say; or category -> the words that mean it,
    one entry per site where they differ. Numbers compare as numbers: 1 and 1.0 are the same. Another word is not observed, and
    counted; `strict`: it is an error. Of several rows the last counts.
    """

    name: Name
    code: LocalCode | None = None
    unit: LocalUnit | None = None
    canonical: str | None = None
    range: tuple[float | None, float | None] = (None, None)
    type: Literal["numeric", "binary", "categorical"] = "numeric"
    # Left out of what is stored where they are not given: cards from before there was such a thing keep their fingerprint.
    categories: tuple[str, ...] | dict[str, LocalCode] | None = Field(None, exclude_if=lambda categories: categories is None)
    strict: bool = Field(False, exclude_if=lambda strict: not strict)
    values: dict[str, float] = Field(default_factory=dict)
    missing: tuple[float, ...] = ()
    molar_mass_g_mol: float | None = Field(None, gt=0)
    valence: int | None = Field(None, ge=1)
    aggregate: Literal["last", "mean", "min", "max"] | None = None

    @model_validator(mode="after")
    def _range_is_ordered(self) -> "VariableCard":
        low, high = self.range
        if low is not None and high is not None and low >= high:
            raise ValueError(f"range [{low}, {high}] is empty")
        if self.type == "binary" and self.range != (None, None):
            raise ValueError("a binary variable is 0 or 1 and needs no range")
        return self

    @model_validator(mode="after")
    def _categories_are_whole(self) -> "VariableCard":
        if (self.type == "categorical") != (self.categories is not None):
            raise ValueError("`categories` and `type: categorical` belong together")
        if self.categories is None:
            if self.strict:
                raise ValueError("`strict` is for categorical variables")
            return self
        if len(self.category_names) < 2 or len(set(self.category_names)) != len(self.category_names) or "" in self.category_names:
            raise ValueError("two or more categories are needed, each once, none of them empty")
        given = (self.unit, self.canonical, self.molar_mass_g_mol, self.valence)
        if any(one is not None for one in given) or self.range != (None, None) or self.values or self.missing:
            raise ValueError("a categorical variable has categories alone: no unit, range, values or numbers that mean missing")
        if self.aggregate not in (None, "last"):
            raise ValueError(f"codes have no {self.aggregate}: of a categorical variable the last counts")
        return self

    @property
    def category_names(self) -> tuple[str, ...]:
        """The categories in the order of their codes; empty for numbers."""
        return tuple(self.categories or ())

    @property
    def category_words(self) -> dict[str, LocalCode]:
        """Category -> what a cell says that means it."""
        return self.categories if isinstance(self.categories, dict) else {name: name for name in self.categories or ()}

    def words_at(self, site: str) -> tuple[tuple[str, int], ...]:
        """What a cell may say at a site, with the code of its category."""
        words = enumerate(self.category_words.values())
        return tuple((word, code) for code, local in words for word in codes_at(local, site))

    @property
    def canonical_unit(self) -> str:
        """The unit of the release; empty for a plain number."""
        return self.canonical if self.canonical is not None else self.unit if isinstance(self.unit, str) else ""

    def codes_at(self, site: str) -> tuple[str, ...]:
        """Local codes or columns at a site; empty where the site does not record the variable."""
        return codes_at(self.name if self.code is None else self.code, site)

    def unit_at(self, site: str) -> str | None:
        """The unit that the card states for a site; None where it states none."""
        return self.unit.get(site) if isinstance(self.unit, dict) else self.unit

    def spec(self) -> VariableSpec:
        """The variable as the release describes it."""
        if self.type == "categorical":
            return VariableSpec.categorical(self.name, self.category_names)
        low, high = self.range
        return VariableSpec(name=self.name, unit=self.canonical_unit, low=low, high=high, type=self.type)


class MultiHot(CardPart):
    """Binary variables from one column of a wide table that holds codes joined by a separator.

    codes: variable -> its codes; a code that ends in `*` stands for all that begin so. prefix goes before every variable's name.
    Without a separator the whole cell is one code (one-hot). An empty cell means none of them; NA, ? and the like mean not known.
    """

    column: str
    separator: str | None = Field(None, min_length=1)
    prefix: str = Field("", pattern=r"^([a-z][a-z0-9_]*)?$")
    codes: dict[Name, LocalCode] = Field(min_length=1)

    def specs(self) -> tuple[VariableSpec, ...]:
        """The variables as the release describes them."""
        return tuple(VariableSpec(name=f"{self.prefix}{name}", type="binary") for name in self.codes)


def codes_at(code: Any, site: str) -> tuple[str, ...]:
    """The codes of a LocalCode at one site, as a tuple; empty where there are none."""
    here = code.get(site) if isinstance(code, dict) else code
    if here is None:
        return ()
    return (here,) if isinstance(here, str) else tuple(here)
