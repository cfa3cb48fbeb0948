"""``python -m tuner`` and the ``nsa-tune`` command."""

from tuner.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
