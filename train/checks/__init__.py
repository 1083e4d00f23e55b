"""Rules between options, a file for each subject: `..._faults` gives a message for each rule that is broken."""
