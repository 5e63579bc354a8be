#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Writes a backbone with its dilation pattern as an ONNX file, and checks the file with onnxruntime."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# Python puts this script's folder first, where search.py would pass for the package `search`;
# the working folder comes instead, so that --arch finds the user's own modules.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

EPILOG = """examples:
  python tools/export.py --pattern pattern_zoo/scattered_digits/ic_resnet50_k9.json --output net.onnx
  python tools/export.py --arch ic_resnet50 --pattern k9.json --checkpoint trained.pth --output net.onnx
  python tools/export.py --arch timm.models.resnet:resnet26 --pattern k9.json --output net.onnx
"""
TOLERANCE = 1e-4  # of an output of size one


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from search.arch import known_archs

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        default="ic_resnet50",
        help=f"package.module:factory, or one of {', '.join(known_archs())} (default ic_resnet50)",
    )
    parser.add_argument("--pattern", metavar="FILE", help="the dilations (default: a plain network)")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (default: random ones)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument(
        "--image-size",
        type=_positive,
        nargs="+",
        default=[224],
        metavar="PX",
        help="height and width, or one number for both (default 224); the batch size stays free",
    )
    parser.add_argument(
        "--opset", type=_positive, default=18, metavar="N", help="ONNX operators (default 18)"
    )
    parser.add_argument("--no-fuse", action="store_true", help="keep batch norms as they are")
    args = parser.parse_args(argv)
    if len(args.image_size) > 2:
        parser.error(f"--image-size takes one or two numbers; got {len(args.image_size)}")
    return args


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        return 2
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    missing = _missing()
    if missing:
        raise ValueError(f"export needs {missing}: pip install 'ic-conv[export]'")
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output}: the folder {args.output.parent} does not exist")
    import torch

    from ic_conv import fuse
    from ic_conv._files import atomic_path

    height, width = args.image_size if len(args.image_size) == 2 else args.image_size * 2
    network = build(args).eval()
    if not args.no_fuse:
        network = fuse(network)
    torch.manual_seed(0)
    images = torch.rand(2, 3, height, width)
    with atomic_path(args.output) as path:
        write(network, images, path, args.opset)
        difference = check(network, images, path)  # before the file takes the place of an older one
    size = args.output.stat().st_size / 2**20
    print(f"{args.output}: {size:.1f} MiB, images (N, 3, {height}, {width}) for any N")
    print(
        f"onnxruntime and PyTorch differ by {difference:.1g} of the largest output, with 2 images and with 1"
    )


def _missing() -> str:
    import importlib.util

    names = ("onnx", "onnxruntime", "onnxscript")
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


def build(args: argparse.Namespace) -> nn.Module:
    """The network with its pattern and weights; ValueError if they do not fit."""
    from ic_conv import DilationPattern, apply_pattern, checkpoint, models
    from search.arch import build_network, known_archs

    if args.arch in known_archs():
        return getattr(models, args.arch)(args.pattern, weights=args.checkpoint)
    network = build_network(args.arch)
    state, source = ({}, "") if args.checkpoint is None else checkpoint.read_weights(args.checkpoint)
    plain = checkpoint.layout(state) == "plain"
    if state and plain:
        checkpoint.load_weights(network, state, source)
    if args.pattern is not None:
        network = apply_pattern(network, DilationPattern.load(args.pattern), inplace=True)
    if state and not plain:
        checkpoint.load_weights(network, state, source)
    return network


def write(network: nn.Module, images: Tensor, path: Path, opset: int) -> None:
    """Exports by tracing, which takes a third of the other exporter's time."""
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    outputs = output_names(network, images)
    free = {name: {0: "batch"} for name in ("images", *outputs)}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (images,),
            str(path),
            input_names=["images"],
            output_names=outputs,
            dynamic_axes=free,
            opset_version=opset,
            dynamo=False,
        )


def output_names(network: nn.Module, images: Tensor) -> list[str]:
    count = len(_outputs(network, images[:1]))
    return ["output"] if count == 1 else [f"output{index}" for index in range(count)]


def check(network: nn.Module, images: Tensor, path: Path) -> float:
    """Largest difference between the file's results and the network's, as a part of the largest result.

    Raises:
        ValueError: they differ by more than the tolerance.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):
        results = session.run(None, {"images": batch.numpy()})
        for result, expected in zip(results, _outputs(network, batch), strict=True):
            scale = float(expected.abs().max().clamp(min=1))
            worst = max(worst, float(abs(result - expected.numpy()).max()) / scale)
    if not worst <= TOLERANCE:  # also if it is NaN
        raise ValueError(
            f"onnxruntime and PyTorch differ by {worst:.2g} of the largest output, over {TOLERANCE}"
        )
    return worst


def _outputs(network: nn.Module, images: Tensor) -> tuple[Any, ...]:
    import torch

    with torch.no_grad():
        outputs = network(images)
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


if __name__ == "__main__":
    raise SystemExit(main())
