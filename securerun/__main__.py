"""`python -m securerun`: the same as the command securerun."""

from securerun.run import main

if __name__ == "__main__":
    main()
