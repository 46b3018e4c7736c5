"""Linux's numbers and structures: generated from a checked-in BTF extract, with tables for what is only #defined."""
