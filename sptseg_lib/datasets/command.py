"""The command line that the prepare scripts share."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .layouts import Layout
from .prepare import prepare


def command(layout: Layout, variants: dict[str, Layout] | None = None) -> None:
    """The command line of a prepare script; variants: other layouts by the flag that chooses them."""

    def main(
        out: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete and verified.")],
        sources: Annotated[
            list[Path] | None,
            typer.Option("--from", help="An archive, or a folder with archives or their files; repeat for several."),
        ] = None,
        archives: Annotated[
            Path | None, typer.Option(help="Folder for downloads; default: archives/ beside OUT.")
        ] = None,
        unofficial: Annotated[
            bool, typer.Option("--unofficial", help="A subset: do not enforce published checksums and counts.")
        ] = False,
        workers: Annotated[int, typer.Option(min=1, help="Processes that convert and verify.")] = os.cpu_count() or 1,
        variant: Annotated[
            str | None, typer.Option(help=f"Another form of the data set: {', '.join(variants or {}) or 'none'}.")
        ] = None,
    ) -> None:
        """Get the archives, unpack them, convert the masks to train ids and verify all of it; or verify it again."""
        if variant and variant not in (variants or {}):
            _stop(f"there is no variant {variant!r}; known: {', '.join(variants or {}) or 'none'}")
        there = out.exists()
        try:
            chosen = variants[variant] if variant else layout
            manifest = prepare(chosen, out, sources or (), archives, not unofficial, workers)
        except KeyboardInterrupt:
            _stop("interrupted; what was done is kept, and the same command goes on", 130)
        except (ValueError, OSError) as error:
            _stop(str(error))
        sets = ", ".join(f"{row['pictures']} {name}" for name, row in manifest["sets"].items())
        kind = "official" if manifest["official"] else "unofficial"
        typer.echo(f"{out}: {'verified, nothing to do' if there else 'prepared and verified'} ({kind}; {sets}).")

    typer.run(main)


def _stop(message: str, code: int = 2) -> None:
    typer.echo(f"Error: {message}", err=True)
    sys.exit(code)
