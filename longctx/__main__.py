"""`python -m longctx`: the command line."""

from longctx.launch.main import main

if __name__ == "__main__":
    main()
