"""The `nblora` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say in one line what is missing for it."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("The nblora command needs Typer and Rich: pip install 'nblora[cli]'")
    from nblora.cli import app

    app()


if __name__ == "__main__":
    main()
