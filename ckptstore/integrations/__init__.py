"""Other people's frameworks and services, one per file: each is imported only where it is used."""
