"""``--help`` with whole summaries and an example for each command."""

from __future__ import annotations

import click

__all__ = ["WholeSummaries", "add_examples"]

#: By the words of the command.
_EXAMPLES = {
    "check": "dramatiq-policies check shop.jobs --live",
    "new": "dramatiq-policies new shop/jobs/send_confirmation.py --design design.toml",
    "explain": "dramatiq-policies explain shop.jobs:send_confirmation EmailTimeout",
    "dead": "dramatiq-policies dead summary shop.jobs",
    "dead summary": "dramatiq-policies dead summary shop.jobs --newer-than 2h",
    "dead list": "dramatiq-policies dead list shop.jobs --actor charge --where order_id=7",
    "dead show": "dramatiq-policies dead show shop.jobs 81e1c967",
    "dead replay": "dramatiq-policies dead replay shop.jobs --actor charge --rate 10 --dry-run",
    "dead purge": "dramatiq-policies dead purge shop.jobs --older-than 30d --dry-run",
    "queues": "dramatiq-policies queues shop.jobs",
    "queues show": "dramatiq-policies queues shop.jobs --watch",
    "queues move": "dramatiq-policies queues move shop.jobs mail --to urgent --limit 100",
    "outbox": "dramatiq-policies outbox list shop.jobs",
    "outbox list": "dramatiq-policies outbox list shop.jobs --actor send_confirmation",
    "outbox retry": "dramatiq-policies outbox retry shop.jobs --id 81e1c967",
    "outbox purge": "dramatiq-policies outbox purge shop.jobs --actor send_confirmation --dry-run",
    "outbox relay": "dramatiq-policies outbox relay shop.jobs",
    "monitor": "dramatiq-policies monitor shop.jobs",
    "keys": "dramatiq-policies keys show shop.jobs:charge 7 12.50",
    "keys show": "dramatiq-policies keys show shop.jobs:charge 7 12.50",
    "keys forget": "dramatiq-policies keys forget shop.jobs:charge 7 12.50",
}


class WholeSummaries(click.Group):
    """A group that prints each command's whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(1_000)) for name, one in commands if one is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def add_examples(command: click.Command, words: str = "") -> None:
    """Add its example to a command and to each of its subcommands."""
    if words in _EXAMPLES:
        command.epilog = f"\b\nExample:\n  {_EXAMPLES[words]}"
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            add_examples(one, f"{words} {name}".strip())
