# SPDX-License-Identifier: Apache-2.0
"""The ``zipfast`` command. Sub-commands import what they need when they run, so that ``zipfast info`` always works."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

# The commands with a module of their own in zipfast.commands.
MODULES = {
    "zip": "merge trained models of one architecture (ZipIt!), wholly or up to a cut",
    "rank": "rank pre-trained models for labelled data (LogME and others), without fine-tuning",
    "soup": "average fine-tuned checkpoints into one better model (uniform, greedy, learned), or say why not",
    "ticket": "find lottery tickets: sparse networks that train as well as the dense one, with their controls",
    "bench": "measure every op and system beside its installed peers on this machine, and write a report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for bad input (one sentence on stderr), 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="zipfast", description="Merge, rank and average trained networks without training; find lottery tickets."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, and which backends can be used here and why not")
    info.add_argument("--json", action="store_true", help="print JSON")

    demo = commands.add_parser("demo", help="train two small ResNets on digits, merge them, print and plot the result")
    demo.add_argument("--out", default="demo-out", help="folder for model, picture and JSON (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the pair (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=15, help="epochs per model (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")

    modules = {
        name: commands.add_parser(name, help=about, allow_abbrev=False)  # a short --conf would not be read as --config
        for name, about in MODULES.items()
    }

    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in modules:
        return _command(modules[given[0]], given[0], given[1:])
    args = parser.parse_args(given)
    try:
        return _info(args) if args.command == "info" else _demo(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        print(f"zipfast {args.command}: {e}", file=sys.stderr)
        return 1


def _command(parser: argparse.ArgumentParser, name: str, argv: Sequence[str]) -> int:
    """A command with a module of its own, whose options may stand in a YAML file."""
    try:
        module = import_module(f"zipfast.commands.{name}")
        common = import_module("zipfast.commands.common")
        module.configure(parser)
        common.add_common(parser)
        return int(module.run(common.parse(parser, argv)))
    except KeyboardInterrupt:
        print(f"zipfast {name}: interrupted; files are whole or not there", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        print(f"zipfast {name}: {' '.join(str(e).split()).removeprefix(f'{name}: ')}", file=sys.stderr)
        return 1


def facts() -> dict[str, Any]:
    """Versions, build facts and the state of each backend, as ``zipfast info`` prints them."""
    import numpy
    import torch

    import zipfast
    from zipfast.ops import why_not

    build: dict[str, Any] = {"compiled": False}
    try:
        from zipfast._C import build_info, simd_level

        build = {"compiled": True, **build_info, "simd": simd_level()}
    except ImportError:
        pass  # a pure-torch install: the backends below say so, with the reason
    return {
        "zipfast": zipfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda or "none (CPU build)",
        "numpy": numpy.__version__,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "build": build,
        "backends": {name: why_not(name) or "usable" for name in ("torch", "cpu", "cuda", "emu")},
    }


def _info(args: argparse.Namespace) -> int:
    data = facts()
    if args.json:
        print(json.dumps(data, indent=1))
        return 0
    for key, value in data.items():
        if not isinstance(value, dict):
            print(f"{key:<12} {value}")
    print("build")
    for key, value in data["build"].items():
        print(f"  {key:<17} {value}")
    print("backends")
    for key, value in data["backends"].items():
        note = "  (tests only: the CUDA source run on the host)" if key == "emu" else ""
        print(f"  {key:<17} {value if value == 'usable' else 'not usable: ' + value}{note}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from zipfast import demo

    demo.run(args.out, seed=args.seed, epochs=args.epochs, as_json=args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
