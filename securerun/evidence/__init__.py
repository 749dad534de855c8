"""What an auditor is shown of a launch: its plan as data, the communication matrix, the report."""
