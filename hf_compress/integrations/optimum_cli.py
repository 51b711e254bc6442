"""`optimum-cli compress ...`: the same commands as `hf-compress`."""

from __future__ import annotations

import argparse
import importlib

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):
    """Hands everything after `compress` to the command line of hf_compress."""

    COMMAND = CommandInfo(name="compress", help="Compress a model and prove the result, with hf_compress.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take all arguments as they are; without a prefix that marks options, `--help` is one of them."""
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the command and exit."""
        # By name at run time: the command line is the layer above, and only this command should pay for it.
        importlib.import_module("hf_compress.cli.main").main(self.args.arguments, "optimum-cli compress")
