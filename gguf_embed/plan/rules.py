"""Which quantization to take of several that fit equally well: a table of rules.

The first rule that applies picks one and gives its reason. Before them the plan has narrowed the
candidates: to the best tier, to the best fit there, to Q4_K_M and better unless the user named a
quantization, and to files that are on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gguf_embed.gguf import quants
from gguf_embed.plan import speed
from gguf_embed.plan.candidate import Candidate
from gguf_embed.plan.settings import Settings


@dataclass(frozen=True, slots=True)
class Rivals:
    """Candidates of one tier and one fit, best quality first, and what the user said."""

    rows: Sequence[Candidate]
    settings: Settings
    floor: str = quants.SPEED_FLOOR  # as good as the best down to this, where not measured

    @property
    def smallest(self) -> Candidate:
        """By its weights."""
        return min(self.rows, key=lambda row: row.weights_bytes)

    @property
    def sound(self) -> Sequence[Candidate]:
        """Those not measured here to lose quality, nor, not measured, ranked below one that does.

        All, where none is left.
        """
        sound: list[Candidate] = []
        lost = False
        for row in self.rows:
            lost = lost or _as_good(row) is False
            if _as_good(row) is not False and (row.measured.quality is not None or not lost):
                sound.append(row)
        return sound or self.rows

    @property
    def good(self) -> Sequence[Candidate]:
        """Of the sound ones, those that may be taken for their speed."""
        return [row for row in self.sound if _good_enough(row, self.floor)]

    @property
    def timed(self) -> Sequence[Candidate]:
        """Of the good ones, those whose speed was measured here."""
        return [row for row in self.good if row.measured.tokens_per_s is not None]

    @property
    def k_quants(self) -> Sequence[Candidate]:
        """Of the sound ones."""
        return [row for row in self.sound if _is_k_quant(row.quant)]

    @property
    def smallest_sound(self) -> Candidate:
        """The smallest one that was not measured to lose quality."""
        return min(self.sound, key=lambda row: row.weights_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When it applies, and what it picks with which reason."""

    name: str
    applies: Callable[[Rivals], bool]
    pick: Callable[[Rivals], tuple[Candidate, str]]


def pick(
    rows: Sequence[Candidate], settings: Settings, floor: str = quants.SPEED_FLOOR
) -> tuple[Candidate, str]:
    """The one to take of rows with the same tier and fit, best quality first, and why."""
    rivals = Rivals(rows, settings, floor)
    return rule_for(rivals).pick(rivals)


def rule_for(rivals: Rivals) -> Rule:
    """The first rule that applies; the last one always does."""
    return next(rule for rule in RULES if rule.applies(rivals))


def _asked_for(rivals: Rivals) -> tuple[Candidate, str]:
    return rivals.rows[0], "asked for"


def _only_one(rivals: Rivals) -> tuple[Candidate, str]:
    return rivals.rows[0], "the only one that fits"


def _tight(rivals: Rivals) -> tuple[Candidate, str]:
    return rivals.smallest, "the smallest: memory is tight"


def _split(rivals: Rivals) -> tuple[Candidate, str]:
    most = max(rivals.rows, key=lambda row: row.run.n_gpu_layers)
    return most, "puts the most layers on the GPU"


def _memory(rivals: Rivals) -> tuple[Candidate, str]:
    return rivals.smallest, f"the smallest of {len(rivals.rows)} that fit, from {quants.FLOOR} up"


def _quality(rivals: Rivals) -> tuple[Candidate, str]:
    best = rivals.sound[0]
    passed_over = rivals.rows[: rivals.rows.index(best)]
    lost = f"; measured here to lose more: {_names(passed_over)}" if passed_over else ""
    return best, f"the best quality of {len(rivals.rows)} that fit{lost}"


def _measured(rivals: Rivals) -> tuple[Candidate, str]:
    timed = rivals.timed
    fastest = max(timed, key=lambda row: row.measured.tokens_per_s or 0.0)
    others = [row for row in rivals.good if row not in timed]
    untimed = f"; not measured: {_names(others)}" if others else ""
    speed = f"{fastest.measured.tokens_per_s:,.0f} tokens/s"
    return fastest, f"{speed}, the fastest of {len(timed)} measured here{untimed}"


def _as_good_and_fast(rivals: Rivals) -> tuple[Candidate, str]:
    good = rivals.good
    if len(good) == 1:
        return good[0], f"the only one as good as the best of {len(rivals.rows)} that fit"
    if len(rivals.timed) > 1:
        return _measured(rivals)
    best = _names(good[:1])
    told = [row for row in good if row.expected_tokens_per_s is not None]
    fastest = max((row.expected_tokens_per_s or 0.0 for row in told), default=0.0)
    near = [row for row in told if (row.expected_tokens_per_s or 0.0) >= speed.NEAR * fastest]
    chosen = min(near or good, key=lambda row: row.weights_bytes)
    as_good = f"as good as {best}" if chosen.quant != best else "the best quality"
    if not near:
        return chosen, f"{as_good}, and the smallest; no speeds are known of it on such a CPU"
    said = speed.in_words(chosen.expected_tokens_per_s or 0.0)
    return chosen, f"{as_good}, and fast on such a CPU: about {said}"


def _on_gpu(rivals: Rivals) -> tuple[Candidate, str]:
    return rivals.smallest_sound, "the smallest is the fastest on a GPU; not measured here"


def _k_quant(rivals: Rivals) -> tuple[Candidate, str]:
    k_quants = rivals.k_quants
    best = ([row for row in k_quants if row in rivals.good] or k_quants)[-1]
    return best, "K-quants are the fastest on most CPUs; not measured here"


def _otherwise(rivals: Rivals) -> tuple[Candidate, str]:
    return rivals.smallest_sound, "the smallest; not measured here"


RULES: Final = (
    Rule(
        name="the user named it",
        applies=lambda rivals: len(rivals.rows) == 1 and rivals.settings.quant is not None,
        pick=_asked_for,
    ),
    Rule(
        name="there is no other",
        applies=lambda rivals: len(rivals.rows) == 1,
        pick=_only_one,
    ),
    Rule(
        name="memory is tight",
        applies=lambda rivals: rivals.rows[0].fit == "tight",
        pick=_tight,
    ),
    Rule(
        name="layers are split: each one on the GPU counts most",
        applies=lambda rivals: (
            rivals.rows[0].tier == "split" and rivals.settings.n_gpu_layers is None
        ),
        pick=_split,
    ),
    Rule(
        name="memory is preferred",
        applies=lambda rivals: rivals.settings.prefer == "memory",
        pick=_memory,
    ),
    Rule(
        name="on a CPU the fastest of those that are as good as the best",
        applies=lambda rivals: (
            rivals.settings.prefer == "quality"
            and rivals.rows[0].tier == "cpu"
            and bool(rivals.good)
        ),
        pick=_as_good_and_fast,
    ),
    Rule(
        name="quality is preferred",
        applies=lambda rivals: rivals.settings.prefer == "quality",
        pick=_quality,
    ),
    # From here on speed is preferred.
    Rule(
        name="speeds were measured here",
        applies=lambda rivals: len(rivals.timed) > 1,
        pick=_measured,
    ),
    Rule(
        name="on a GPU the smallest is usually the fastest",
        applies=lambda rivals: rivals.rows[0].tier == "gpu",
        pick=_on_gpu,
    ),
    Rule(
        name="on a CPU K-quants are usually the fastest",
        applies=lambda rivals: bool(rivals.k_quants),
        pick=_k_quant,
    ),
    Rule(name="nothing is known of their speed", applies=lambda _: True, pick=_otherwise),
)


def _as_good(row: Candidate) -> bool | None:
    """As the best level that was measured beside it; None where that is not known."""
    return None if row.measured.quality is None else row.measured.quality.as_good


def _is_k_quant(quant: str) -> bool:
    return quant in quants.QUANTS and quants.QUANTS[quant].k_quant


def _good_enough(row: Candidate, floor: str) -> bool:
    """For speed: measured to be as good as the best, or no worse than `floor` by what is known."""
    as_good = _as_good(row)
    known = quants.rank(row.quant) <= quants.rank(floor)
    return known if as_good is None else as_good


def _names(rows: Iterable[Candidate]) -> str:
    return ", ".join(row.quant for row in rows)
