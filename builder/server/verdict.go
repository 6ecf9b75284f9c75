package server

import (
	"handler/function/api"
)

// record is the verdict. Its text is masked.
func (res *result) record(image string) api.Record {
	rec := api.Record{Image: image, ImageName: image, Status: api.Success}
	if res.err != nil {
		rec = failedRecord(api.AsError(res.err), image)
		rec.Error = res.mask.Text(rec.Error)
	} else {
		rec.Digest, rec.Commit, rec.Tags, rec.Platforms = res.outcome.Digest, res.outcome.Commit, res.outcome.Tags, res.outcome.Platforms
	}
	for _, warning := range res.outcome.Warnings {
		rec.Warnings = append(rec.Warnings, res.mask.Line(warning))
	}
	return rec
}
