"""Train a small language model whose attention is NSA, on text that comes with Python.

    python examples/train.py                    # CPU, a minute
    python examples/train.py --preset 125m      # GPU, 125M parameters, 32k tokens a step
    python examples/train.py --preset pr31      # ten steps on synthetic data at the shape of PR31; set its flags

Tokens are bytes. The text is the Python language reference as ``pydoc_data`` holds it for ``help("assert")`` (PSF
licence). A step never waits for the GPU. Losses, tokens per second, memory, and which paths ran against which were
requested go to results/records/, from which ``nsa-tune report`` reads them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa import PATHS, NSAAttention, NSAConfig
from nsa.errors import NSAError
from nsa.flags import Flags, read_flags
from tuner.training import TrainingLog, requested_by
from tuner.training_record import TrainingSetup

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a run. ``vocabulary`` beyond 256 gives the model the size and the output layer it is named for.

    ``path``: of selection, where neither a flag nor ``--path`` names one; None = dispatch.
    """

    layer: NSAConfig
    layers: int
    batch: int
    sequence: int
    steps: int
    learning_rate: float
    vocabulary: int = BYTES
    autocast: bool = False
    synthetic: bool = False
    path: str | None = None


SMALL = NSAConfig(
    dim=128, num_heads=4, num_kv_heads=2, head_dim=32, kernel_size=16, kernel_stride=8, block_size=16, topk=4,
    window_size=64,
)  # fmt: skip
PRESETS = {
    "small": Preset(layer=SMALL, layers=2, batch=8, sequence=256, steps=120, learning_rate=2e-3),
    "125m": Preset(
        layer=NSAConfig(dim=768, num_heads=12, num_kv_heads=2, head_dim=64), layers=12, batch=16, sequence=2048,
        steps=60, learning_rate=3e-4, vocabulary=50304, autocast=True, path="triton_union",
    ),
    "pr31": Preset(
        layer=NSAConfig(dim=256, num_heads=8, num_kv_heads=2, head_dim=32), layers=2, batch=1, sequence=1024,
        steps=10, learning_rate=1e-3, synthetic=True,
    ),
}  # fmt: skip


class Block(nn.Module):
    """Attention, then an MLP, each after a norm and added to what came in."""

    def __init__(self, config: NSAConfig, flags: Flags) -> None:
        super().__init__()
        self.attention = NSAAttention(config, flags=flags)
        dim, wide = config.dim, 4 * config.dim
        self.mlp = nn.Sequential(nn.Linear(dim, wide), nn.GELU(), nn.Linear(wide, dim))
        self.before_attention, self.before_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, dim) -> the same shape."""
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class LanguageModel(nn.Module):
    """Byte embedding, blocks, and an output layer that shares the embedding's weights."""

    def __init__(self, preset: Preset, flags: Flags) -> None:
        super().__init__()
        self.embedding = nn.Embedding(preset.vocabulary, preset.layer.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(preset.layer, flags) for _ in range(preset.layers))
        self.norm = nn.RMSNorm(preset.layer.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S + 1) -> the mean loss of predicting each from those before it."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return self.loss(x, tokens[:, 1:])

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (B, S, dim), targets (B, S) -> the mean cross-entropy."""
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile one block, which serves all of them, and the loss. What lies between an attention's projections stays
        eager: dispatch is Python that looks at its call, and its kernels are compiled already."""
        for block in self.blocks:
            block.compile(backend=backend)
        self.loss = torch.compile(self.loss, backend=backend)  # type: ignore[method-assign]


def batches(preset: Preset, device: torch.device) -> Callable[[], Tensor]:
    """A function that draws tokens (batch, sequence + 1) on the device: pieces of the text, or bytes that count up."""
    steps = torch.arange(preset.sequence + 1, device=device)
    text = b"\n\n".join(topics[name].encode() for name in sorted(topics))
    stored = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    random = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        last = BYTES if preset.synthetic else len(text) - preset.sequence
        places = torch.randint(last, (preset.batch, 1), device=device, generator=random) + steps
        return places % BYTES if preset.synthetic else stored[places].long()

    return draw


def training_step(preset: Preset, model: nn.Module, device: torch.device) -> Callable[[], Tensor]:
    """A function that takes one step and returns its loss, a tensor on the device that nobody has waited for."""
    draw = batches(preset, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.95), fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=preset.autocast):
            loss: Tensor = model(draw())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def setup_of(name: str, preset: Preset, model: nn.Module, flags: Flags, *, compiled: bool) -> TrainingSetup:
    """What the record says of the run."""
    return TrainingSetup(
        name=name, layer=msgspec.to_builtins(preset.layer), layers=preset.layers, batch=preset.batch,
        parameters=sum(weight.numel() for weight in model.parameters()), sequence=preset.sequence, steps=preset.steps,
        dtype="bfloat16 autocast" if preset.autocast else "float32",
        text="synthetic, bytes that count up" if preset.synthetic else "Python's pydoc_data.topics, bytes",
        compiled=compiled, requested=requested_by(flags), flags=flags.recorded, overridden=flags.overridden,
    )  # fmt: skip


def train(
    name: str,
    preset: Preset,
    device: torch.device,
    flags: Flags,
    out: Path,
    *,
    compiled: bool = False,
    commit: str = "",
) -> Path:
    """Train, print and record; returns the run's folder."""
    torch.manual_seed(0)
    model = LanguageModel(preset, flags).to(device)
    setup = setup_of(name, preset, model, flags, compiled=compiled)
    if compiled:
        model.compile_parts()
    step = training_step(preset, model, device)
    with TrainingLog(setup, flags, model, device=device, out=out, commit=commit) as log:
        for _ in range(preset.steps):
            log.add(step())
        log.profile(step)
    return log.folder.path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=count, help="instead of the preset's")
    parser.add_argument("--batch", type=count, help="sequences a step, instead of the preset's")
    paths = [name for name, path in PATHS.items() if "selection" in path.operations]
    parser.add_argument(
        "--path", choices=["auto", *paths], metavar="PATH",
        help="force this selection path; auto: the dispatch table's; default: the flags', else the preset's",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks and the loss")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder that receives records/")
    parser.add_argument("--commit", default="", help="commit to record where no git repository is at hand")
    asked = parser.parse_args()
    kind = asked.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device {asked.device}: expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: torch sees no GPU here; use --device cpu")
    try:
        print(f"records {run(asked)}; nsa-tune report shows them")
    except (NSAError, OSError) as error:
        sys.exit(f"train.py: {error}")


def count(text: str) -> int:
    """A number of things, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def run(asked: argparse.Namespace) -> Path:
    """What the command line asks for; returns the run's folder."""
    changes = {name: getattr(asked, name) for name in ("steps", "batch") if getattr(asked, name)}
    preset, flags = replace(PRESETS[asked.preset], **changes), read_flags()
    path = asked.path or flags.path or preset.path
    flags = msgspec.structs.replace(flags, path=None if path == "auto" else path)
    device = torch.device(asked.device)
    return train(asked.preset, preset, device, flags, asked.out, compiled=asked.compile, commit=asked.commit)


if __name__ == "__main__":
    main()
