package buildkit

import "testing"

func TestRuns(t *testing.T) {
	for _, tt := range []struct {
		native, platform string
		want             bool
	}{
		{"linux/amd64", "linux/amd64", true},
		{"linux/amd64", "linux/amd64/v2", true},
		{"linux/amd64", "linux/arm64", false},
		{"linux/arm64", "linux/arm64", true},
		{"linux/arm64", "linux/arm/v7", true},
		{"linux/arm64", "linux/amd64/v2", false},
		{"linux/amd64", "windows/amd64", false},
		{"", "linux/amd64", false},
	} {
		if got := runsNatively(tt.native, tt.platform); got != tt.want {
			t.Errorf("%q runs %q: %v", tt.native, tt.platform, got)
		}
	}
}
