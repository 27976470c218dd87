"""WHERE: hosts, targets, attach, switch, merge. This room knows no method by name."""
