"""The daemon: a control process that decides and never touches payload, and fetch workers that carry it."""
