"""The command ``dramatiq-policies``: a module for each subcommand, on top of `dramatiq_policies.ops`."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from ..common.safe_logger import SafeLogger
from ..ops import OperationError, one_line
from .check import check
from .dead import dead
from .explain import explain
from .help import WholeSummaries, add_examples
from .keys import keys
from .new import new
from .outbox import outbox
from .output import escape_unencodable, ignore_broken_pipe, printable_text
from .queues import monitor, queues

__all__ = ["main"]

#: Click raises this for a group without a command; older versions print the help.
_NO_COMMAND: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


class OneLineErrors(WholeSummaries):
    """A group that prints errors as a sentence on stderr and exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        # Click itself would exit with 1.
        with ignore_broken_pipe():
            return super().invoke(ctx)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        escape_unencodable()
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[call-overload]
        except click.Abort:
            _fail("Interrupted.", 130)
        except _NO_COMMAND as error:
            _fail(f"Missing command: {', '.join(error.ctx.command.list_commands(error.ctx))}.", 2)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except OperationError as error:
            _fail(str(error), 2)
        except Exception as error:
            SafeLogger("dramatiq_policies").debug("", exc_info=True)
            _fail(one_line(error), 2)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int) -> None:
    click.echo(f"Error: {printable_text(' '.join(text.split()))}" if code == 2 else text, err=True)
    sys.exit(code)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dramatiq-policies")
def main() -> None:
    """Operate Dramatiq jobs: check jobs before a release, show failures, and repair them.

    Name the application as for dramatiq: package.module, package.module:broker, package.module:factory. Every
    command exits with 0 if all is well, 1 for findings, 2 for an error.

    For a Django project pass --django (or set DJANGO_SETTINGS_MODULE) and leave APP out. For shell completion:
    eval "$(_DRAMATIQ_POLICIES_COMPLETE=bash_source dramatiq-policies)", with zsh_source in zsh, fish_source in fish.
    """
    # Pika's own log lines would precede our sentence.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


for command in (check, new, explain, dead, queues, outbox, monitor, keys):
    main.add_command(command)
add_examples(main)
