"""Protocol cards: the numbers of an evaluation, with all that must be the same before two numbers are compared, and how they are told.

A card is a dictionary that JSON can hold; evaluation.py fills it. To show more of it, change `lines_of` or `in_words`.
"""

import hashlib
import json
import statistics
import subprocess

from main import HERE, fail


def sha(settings: dict) -> str:
    """The first 12 digits of the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def git_commit() -> str:
    """The commit of this code, with -dirty if files differ from it; unknown where there is no git."""
    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(values: dict[str, list[float]], real: dict[str, float]) -> dict[str, dict]:
    """Of each metric mean, least, greatest and standard deviation over the seeds, and the value of real data."""
    table = {}
    for name, v in values.items():
        table[name] = {"mean": statistics.fmean(v), "min": min(v), "max": max(v), "std": statistics.stdev(v) if len(v) > 1 else None}
        table[name] |= {"real": real.get(name), "values": v}
    return table


def lines_of(card: dict) -> list[str]:
    """What a reader wants to know first of a card."""
    drawing, protocol, extractor = card["drawing"], card["protocol"], card["protocol"]["extractor"]
    steps = f"{drawing['sampling_steps']} steps, " if drawing["sampler"] != "dopri5" else ""
    lines = [f"{card['run']}, step {card['step']}, {card['weights']} weights: {len(card['seeds'])} x {protocol['samples']:,} samples by "
             f"{drawing['sampler']}, {steps}{card['nfe']:g} network calls, guidance {drawing['guidance_scale']:g}"]
    for split, data in protocol["reference"].items():
        lines.append(f"against the {data['items']:,} items of the {split} split{' (' + data['note'] + ')' if data['note'] else ''}")
    if extractor:
        lines.append(f"features of {extractor['name']}, SHA-256 {extractor['sha256'][:12]}")
    lines.append(f"real: {'; '.join(card['real']['what'])}")
    lines += table_of(card["metrics"])
    if "metrics" in card["real"]:
        lines += [f"the first {card['real']['items']:,} samples of each set, as many as there are real items:"]
        lines += table_of(card["real"]["metrics"])
    return lines


def table_of(metrics: dict[str, dict]) -> list[str]:
    """Lines of a table of metrics."""
    columns = [key for key in ("mean", "min", "max", "std", "real") if any(row[key] is not None for row in metrics.values())]
    lines = [f"{'':28}" + "".join(f"{key:>12}" for key in columns)]
    for name, row in metrics.items():
        lines.append(f"{name:28}" + "".join(f"{'' if row[key] is None else f'{row[key]:.4g}':>12}" for key in columns))
    return lines


def in_words(name: str, found: dict) -> str:
    """One line of what a part found."""
    if name == "likelihood":
        value, unit = (found["bits_per_dim"], "bits per dimension") if "bits_per_dim" in found else (found["nats"], "nats an item")
        return f"likelihood  {value:.4f} +- {found['standard_error']:.4f} {unit}, of {found['items']:,} test items"
    if name == "neighbours":
        of_test = f"; of test images {100 * found['test']['near_copies']:.2f}%" if "test" in found else ""
        return f"neighbours  {100 * found['near_copies']:.2f}% of {found['items']:,} samples are near-copies of training images{of_test}"
    if name == "loss":
        return "loss        " + "; ".join(f"{key.replace('_', ' weights, ')} {value:.4g}" for key, value in found.items() if key != "draws")
    best, metric = found["best"], found["metric"]
    return f"curve       {found['points']} points, the best {best['sampler']} with {best['nfe']:g} calls: {metric} {best[metric]:.4g}"


# ---- Cards side by side


def compare(paths: list[str]) -> None:
    """Prints a table of cards. Ends in one line if they were not measured in the same way, or are none."""
    cards = []
    for path in paths:
        try:
            with open(path) as file:
                cards.append(json.load(file))
            cards[-1]["protocol"], cards[-1]["metrics"], cards[-1]["drawing"]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            why = getattr(error, "strerror", None) or "it is no card"
            fail(f"cannot read {path} ({why}): expected a card that evaluate.py wrote, evaluation/*/card.json")
    if not cards:
        fail("compare needs cards: give it files that evaluate.py wrote, as ckpts/*/evaluation/*/card.json")
    for path, card in zip(paths, cards):
        a, b = cards[0]["protocol"], card["protocol"]
        if names := [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]:
            fail(f"{paths[0]} and {path} cannot be compared: they differ in {', '.join(names)}; measure both in the same way")
    names = [name for name in cards[0]["metrics"] if all(name in card["metrics"] for card in cards)]
    rows = [["run", "step", "weights", "sampler", "calls", "guidance", *names]]
    for card in cards:
        values = [f"{card['metrics'][name]['mean']:.4g}" for name in names]
        rows.append([card["run"], str(card["step"]), card["weights"], card["drawing"]["sampler"], f"{card['nfe']:g}",
                     f"{card['drawing']['guidance_scale']:g}", *values])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())
