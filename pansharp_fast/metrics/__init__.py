"""Quality metrics of the field that no library gives, and those that do, under one roof."""
