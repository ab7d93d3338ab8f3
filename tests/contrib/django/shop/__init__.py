"""The app of the project that these tests set up."""
