"""README.md of an export: a model card of the Hugging Face hub, which is Markdown after a block of YAML.

The keys of the YAML block are described at https://huggingface.co/docs/hub/model-cards. It has no ``license``, because
the run does not know one.
"""

from importlib.metadata import version

from ltat_fast.models import standalone
from ltat_fast.models.libraries import is_foreign

PUBLIC_DATASETS = {
    "cifar10-lt": "uoft-cs/cifar10",
    "cifar100-lt": "uoft-cs/cifar100",
    "svhn-lt": "ufldl-stanford/svhn",
    "tinyimagenet-lt": "zh-plus/tiny-imagenet",
    "imagenet-lt": "ILSVRC/imagenet-1k",
}
"""the datasets of which ours are subsets, under their names on the hub"""


def model_card(about: dict, has_module: bool) -> str:
    """Return the content of README.md.

    Args:
        about: the content of config.json
        has_module: whether model.py is beside it
    """
    arch, training = about["architecture"]["arch"], about["training"]
    ratio = training["imbalance_ratio"]
    data = training["dataset"] if ratio is None else f"{training['dataset']} at imbalance ratio {ratio:g}"
    lines = [
        *front_matter(training["dataset"], training["method"], has_module),
        f"# {about['name']}",
        "",
        f"Network: {arch}. Input: {about['input']}. Output: {about['output']}. Training: "
        f"{training['method']} on {data}. Threat model: L_inf, eps {about['threat_model']['eps']}. "
        f"{standalone.CONFIG} has classes, training and scores.",
        "",
        *(usage(arch) if has_module else without_module(arch)),
        *scores(about["accuracy"]),
    ]
    return "\n".join(lines)


def front_matter(dataset: str, method: str, has_module: bool) -> list[str]:
    """Return the YAML block. dataset: name of ours, which is left out if it is not public."""
    tags = ["adversarial-training", "adversarial-robustness", "long-tailed-recognition", method]
    if has_module:  # the tags with which the mixin marks the folders that it can load
        tags += ["model_hub_mixin", "pytorch_model_hub_mixin"]
    lines = ["---", "library_name: ltat-fast", "pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    if dataset in PUBLIC_DATASETS:
        lines += ["datasets:", f"- {PUBLIC_DATASETS[dataset]}"]
    return [*lines, "metrics:", "- accuracy", "---", ""]


def usage(arch: str) -> list[str]:
    """Return the lines that say how to load the network with model.py."""
    library = arch.partition(":")[0]
    needs = f", safetensors and {library} ({version(library)} wrote it)" if is_foreign(arch) else " and safetensors"
    return [
        f"With torch{needs}, in this folder:",
        "",
        "```python",
        "from model import load_model",
        "",
        "logits = load_model()(images)",
        "```",
        "",
        "From the Hugging Face hub, with huggingface_hub too:",
        "",
        "```python",
        "import sys",
        "from huggingface_hub import snapshot_download",
        "",
        'folder = snapshot_download("USER/NAME")',
        "sys.path.insert(0, folder)",
        "from model import Model",
        "",
        "logits = Model.from_pretrained(folder)(images)",
        "```",
        "",
    ]


def without_module(arch: str) -> list[str]:
    """Return the lines that say how to build a network whose code is not in the folder."""
    return [
        "There is no model.py, and `from_pretrained` cannot load this folder: the network is the return value of the",
        f"function {arch.removeprefix('module:')}, and its code is not ours. Its weights are in {standalone.WEIGHTS}:",
        "`net.` is before their names, and `fc.` is the last layer if it is linear.",
        "",
    ]


def scores(accuracy: dict) -> list[str]:
    """Return a table of the accuracies in config.json, or nothing if there are none."""
    if not accuracy:
        return []
    lines = ["| attack | accuracy (%) | of the tail (%) | images |", "|---|---:|---:|---:|"]
    for attack, result in accuracy.items():
        everywhere, tail = ("-" if (value := result.get(key)) is None else f"{value:.2f}" for key in ("all", "tail"))
        lines.append(f"| {attack} | {everywhere} | {tail} | {result.get('images', '-')} |")
    return [*lines, ""]
