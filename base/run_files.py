"""The files that a training run leaves, read again: by figures (base/plot.py), the report (run/report.py) and
trackers. They may be damaged, so every reader raises BadInput; a run may be under way, so a last line that is
not finished is left out. H heads, D head size.
"""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from base import durable, limits
from base.cli import BadInput

LARGEST, MOST_LAYERS = 4096, 400  # heads, or dimensions of one; what fits into a figure of 65,536 pixels


def read_metrics(path):
    """metrics.jsonl -> its lines, each {"step": int, ...} without nesting: see `flat`. Raises BadInput."""
    try:
        with limits.opened(path) as file:
            lines = [line for line in file if line.endswith(b"\n")]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = limits.parse_json(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
            raise BadInput(f'{path}, line {number} is not a line of metrics: no "step"; remove it')
        rows.append(flat(row))
    if not rows:
        raise BadInput(f"{path} has no rows")
    return rows


def flat(row):
    """{"seconds": {"rollout": 1.0}} -> {"seconds/rollout": 1.0}, at any depth."""
    result = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= {f"{key}/{name}": each for name, each in flat(value).items()}
        else:
            result[key] = value
    return result


def column(path, rows, key):
    """-> the numbers under `key` in the rows that read_metrics returned, None where there is none. Raises
    BadInput for something else than a number."""
    values = [row.get(key) for row in rows]
    for number, value in enumerate(values, 1):
        if not is_number(value) and value is not None:
            raise BadInput(f'{path}, line {number} is not a line of metrics: "{key}" must be a number')
    return values


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e100


def read_json(path, what="what train.py leaves"):
    """A JSON file that holds an object -> it. Raises BadInput."""
    try:
        value = limits.parse_json(limits.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} is not {what}: {reason}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not {what}: no JSON object")
    return value


def read_results(path):
    """results.json -> {"before": sets, "after": sets}, each {name of the held-out set: {"prompts",
    "accuracy", "accuracy_greedy", ...}}, {} where nothing was evaluated. Raises BadInput."""
    results = read_json(path)
    for when in ("before", "after"):
        if when not in results:
            raise BadInput(f'{path} is not what train.py leaves: no "{when}"; remove it')
        results[when] = check_held_out(path, results[when] or {})
    return results


def check_held_out(where, sets):
    """What run/held_out.py returned, read again -> the same. Raises BadInput, which begins with `where`."""
    good = isinstance(sets, dict) and all(isinstance(each, dict) for each in sets.values())
    for each in sets.values() if good else ():
        shares = each.get("accuracy"), each.get("accuracy_greedy", 0)
        good = good and type(each.get("prompts")) is int and each["prompts"] > 0
        good = good and all(is_number(share) and 0 <= share <= 1 for share in shares)
    if not good:
        raise BadInput(f"{where} is not what train.py leaves: held-out accuracy {sets}; remove it")
    return sets


def held_out(directory, rows):
    """-> {name of the set: [(step, result), ...]}: results of run/held_out.py before, during (--eval-every)
    and after training. rows: of read_metrics. Raises BadInput."""
    found, at = [], rows[-1]["step"] if rows else 0
    for row in rows:
        sets = {}
        for key, value in row.items():
            if key.startswith("held_out/"):  # the name of a set may be a path
                name, field = key.removeprefix("held_out/").rsplit("/", 1)
                sets.setdefault(name, {})[field] = value
        where = f"{directory / 'metrics.jsonl'}, step {row['step']}"
        found.append((row["step"], check_held_out(where, sets)))
    if (directory / "results.json").exists():
        results = read_results(directory / "results.json")
        found = [(0, results["before"]), *[each for each in found if each[0] < at], (at, results["after"])]
    by_set = {}
    for step, sets in found:
        for name, result in sets.items():
            by_set.setdefault(name, []).append((step, result))
    return by_set


def add_kept(path, rows):
    """Give each of the rows that read_metrics returned "kept", the share of sampled groups whose rewards
    differ. Raises BadInput as column."""
    right, wrong = column(path, rows, "all_right"), column(path, rows, "all_wrong")
    for row, *shares in zip(rows, right, wrong):
        row["kept"] = None if None in shares else 1 - sum(shares)


def load_magnitudes(path):
    """The file that save_magnitudes wrote -> {name: magnitudes (H, D) fp32, name + ".selected": (H, D) bool}.

    Raises BadInput for a file that cannot be read or holds other tensors."""
    try:
        limits.check(path)
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    layers = range(sum(name.endswith("q_proj") for name in tensors))
    names = [f"model.layers.{i}.self_attn.{which}_proj" for i in layers for which in "qk"]
    wanted = {name + of for name in names for of in ("", ".selected")}
    other = not tensors or tensors.keys() != wanted or len(layers) > MOST_LAYERS
    if other or not all(_is_pair(tensors, name) for name in names):
        fix = "a run of train.py with --rule top leaves them"
        raise BadInput(f"{path} does not hold the magnitudes of Q and K; {fix}")
    return tensors


def _is_pair(tensors, name):
    """Whether they hold magnitudes of a size that a figure can have, and which of them were selected."""
    magnitude, selected = tensors[name], tensors[name + ".selected"]
    if magnitude.dim() != 2 or not 0 < min(magnitude.shape) <= max(magnitude.shape) <= LARGEST:
        return False
    good = magnitude.dtype == torch.float32 and bool((magnitude.isfinite() & (magnitude >= 0)).all())
    return good and selected.dtype == torch.bool and selected.shape == magnitude.shape


def save_magnitudes(path, magnitudes, masks):
    """Magnitudes {name: (H, D) fp32} and masks {name.weight: (H * D,) bool} of one step -> a safetensors
    file, see load_magnitudes. Raises BadInput when the disk cannot be written."""
    tensors = {}
    for name, magnitude in magnitudes.items():
        tensors[name] = magnitude.cpu()
        tensors[f"{name}.selected"] = masks[f"{name}.weight"].view_as(magnitude).cpu().contiguous()
    try:
        with durable.replacing(path) as partial:
            save_file(tensors, partial)
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be written: {error}") from error


def some_layers(tensors):
    """What load_magnitudes returned -> four of its layers, the first and the last among them."""
    layers = len(tensors) // 4
    return sorted({round(i * (layers - 1) / 3) for i in range(4)})


def concentration(tensors, which):
    """What load_magnitudes returned -> the share of Q's or K's (`which`: "q" or "k") squared magnitude that
    lies in the selected rows, of each layer."""
    shares = []
    for layer in range(len(tensors) // 4):
        name = f"model.layers.{layer}.self_attn.{which}_proj"
        squares = tensors[name].double().square()
        shares.append((squares[tensors[name + ".selected"]].sum() / squares.sum()).item())
    return shares


def selected_share(tensors, which):
    """What load_magnitudes returned -> the share of Q's or K's rows that are selected."""
    masks = [mask for name, mask in tensors.items() if name.endswith(f"{which}_proj.selected")]
    return sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def outline(selected):
    """(rows, columns) bool -> [(x, y, dx, dy), ...]: lines along the edges between cells that are selected
    and cells that are not. Cell (row, column) is the square from (column, row) to (column + 1, row + 1)."""
    padded, lines = torch.nn.functional.pad(selected.int(), (1, 1, 1, 1)), []
    for across, edges in ((True, padded.diff(dim=0)[:, 1:-1]), (False, padded.diff(dim=1)[1:-1].T)):
        for place, cells in enumerate(edges.ne(0).int()):
            ends = torch.nn.functional.pad(cells, (1, 1)).diff().nonzero().flatten().tolist()
            for start, end in zip(ends[::2], ends[1::2]):
                lines.append((start, place, end - start, 0) if across else (place, start, 0, end - start))
    return lines
