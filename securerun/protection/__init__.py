"""The launcher's side of a lease: the plan, the way to a guard, and what is said. All of it runs as the user."""
