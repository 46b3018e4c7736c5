"""``python -m kbpf``: the command ``kbpf``."""

from kbpf.cli.main import main

main()
