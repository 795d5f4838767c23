"""minim3 inside other libraries. Nothing else in the package imports from here."""
