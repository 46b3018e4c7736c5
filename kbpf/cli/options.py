"""Options that commands have in common."""

from __future__ import annotations

import click

from kbpf.specs import FILE_LAYOUTS

link = click.option(
    "--link",
    type=click.Choice(list(FILE_LAYOUTS), case_sensitive=False),
    default="EN10MB",
    show_default=True,
    help="Link type of the packets.",
)
order = click.option(
    "--order",
    type=click.Choice(["traffic", "libpcap"]),
    default="traffic",
    show_default=True,
    help="Order of the tests: what runs fewest instructions over usual traffic, or libpcap's.",
)
no_dns = click.option("-n", "no_dns", is_flag=True, help="Ask no name server for host names.")
