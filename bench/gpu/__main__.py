"""The command `python -m bench.gpu`."""

from bench.gpu.first_day import main

if __name__ == "__main__":
    raise SystemExit(main())
