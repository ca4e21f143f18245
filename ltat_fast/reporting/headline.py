"""The headline of a report: one sentence that compares the methods on their rarest classes."""

from dataclasses import dataclass
from math import hypot
from statistics import mean, stdev

from ltat_fast.reporting.study import Study, attack_name, method_name, options
from ltat_fast.runs.experiments import Experiment

ENOUGH_SEEDS = 3  # the standard deviation of two values says almost nothing


@dataclass(frozen=True)
class Rank:
    """An experiment and its accuracies in percent, one per seed."""

    experiment: Experiment
    name: str
    robust: list[float]
    clean: list[float]


@dataclass(frozen=True)
class Headline:
    """The result in one sentence, and a caveat. group: "tail" or "all". ranking: the highest mean first."""

    sentence: str
    caveat: str
    group: str
    ranking: list[Rank]


def headline(study: Study, test_counts: dict[str, int] | None = None) -> Headline:
    """Rank the methods by their accuracy on the tail under the study's attack.

    If a run has no accuracy on the tail, all classes are ranked; if the study has no attack, clean accuracy is ranked.
    test_counts: test images by group, if known; the caveat then says how many points a single image makes.
    """
    attack = study.attack or "clean"
    measured = [e.values(study.checkpoint, attack, "tail") for e in study.experiments]
    group = "tail" if all(measured) else "all"
    ranking = [
        Rank(e, name, e.values(study.checkpoint, attack, group), e.values(study.checkpoint, "clean", group))
        for e, name in zip(study.experiments, names(study.experiments), strict=True)
    ]
    ranking = sorted((rank for rank in ranking if rank.robust), key=lambda rank: -mean(rank.robust))
    images = "tail-class images" if group == "tail" else "test images"
    if not ranking:
        return Headline("No run has been evaluated yet.", "", group, [])
    under = f" under {attack_name(attack)}" if study.attack else ""
    number = (test_counts or {}).get(group)
    whole = number is not None and all(
        rank.experiment.images(study.checkpoint, attack) == {test_counts["all"]} for rank in ranking
    )
    weight = f" One of the {number} {images} makes {100 / number:.2g} points." if whole else ""
    first, *others = ranking
    top, *rest = [f"{mean(rank.robust):.1f} %" for rank in ranking]
    sentence = f"{first.name} classifies {top} of {images} correctly{under}"
    if not others:
        return Headline(f"{sentence}.", _seeds(ranking) + weight, group, ranking)
    if len(others) <= 2:
        against = " and ".join(f"{number} for {rank.name}" for number, rank in zip(rest, others, strict=True))
    else:
        against = f"{rest[0]} for {others[0].name}, the next of {len(ranking)} methods, and {rest[-1]} for the last, "
        against += others[-1].name
    return Headline(f"{sentence}, against {against}.", _doubt(ranking) + weight, group, ranking)


def _doubt(ranking: list[Rank]) -> str:
    first, second = ranking[:2]
    gap = mean(first.robust) - mean(second.robust)
    if min(len(first.robust), len(second.robust)) < ENOUGH_SEEDS:
        told = f"So few seeds cannot show whether {first.name} leads {second.name} by more than chance."
        return f"{_seeds(ranking)} {told}"
    spread = hypot(stdev(first.robust), stdev(second.robust))
    verdict = "are within" if gap <= spread else "exceed"
    between = f"The {gap:.1f} points between {first.name} and {second.name}"
    return f"{_seeds(ranking)} {between} {verdict} the spread of their difference, {spread:.1f}."


def _seeds(ranking: list[Rank]) -> str:
    seeds = {len(rank.robust) for rank in ranking}
    if seeds == {1}:
        return "One seed each."
    fewest, most = min(seeds), max(seeds)
    return f"Mean ± standard deviation over {most if fewest == most else f'{fewest} to {most}'} seeds."


def names(experiments: tuple[Experiment, ...]) -> list[str]:
    """The names of the methods, with their options if a method occurs twice."""
    plain = [method_name(e) for e in experiments]
    own = [options(e) or "defaults" for e in experiments]
    return [f"{n} ({o})" if plain.count(n) > 1 else n for n, o in zip(plain, own, strict=True)]
