"""Adds `compress` to `optimum-cli`, which imports every file of this namespace at start-up."""

from hf_compress.integrations.optimum_cli import CompressCommand

REGISTER_COMMANDS = [CompressCommand]
