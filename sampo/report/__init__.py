"""From records to tables, figures and one page. Needs the extra `report`."""
