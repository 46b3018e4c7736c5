"""What a user holds, on either backend: filters, programs, maps, links, collections, and the choice of backend."""
