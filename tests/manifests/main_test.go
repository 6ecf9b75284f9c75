package manifests

import (
	"testing"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }
