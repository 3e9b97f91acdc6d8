"""Charts of records, for notebooks, reports and pages."""
