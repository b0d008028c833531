// Plays schedules on etcd's raft 3.4 as Debian packages it, the counterpart of
// tests/consensus/test_beside_go_raft.py. Reads one command a line; for each `show` it prints one
// line of JSON: every node's term, role, commit index, and what it applied.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io/ioutil"
	"log"
	"math"
	"os"
	"strconv"
	"strings"

	"go.etcd.io/etcd/raft"
	"go.etcd.io/etcd/raft/raftpb"
)

const begun = 10 // The index of the snapshot that every member begins with.

type storage struct {
	*raft.MemoryStorage
	conf raftpb.ConfState // Of what is applied.
}

func (s *storage) InitialState() (raftpb.HardState, raftpb.ConfState, error) {
	hard, _, err := s.MemoryStorage.InitialState()
	return hard, s.conf, err
}

type node struct {
	raw     *raft.RawNode
	disk    *storage
	index   uint64
	applied []string
}

type state struct {
	Term    uint64   `json:"term"`
	Role    string   `json:"role"`
	Commit  uint64   `json:"commit"`
	Applied []string `json:"applied"`
}

var (
	nodes    map[uint64]*node
	count    uint64
	prevote  bool
	side     map[uint64]string
	messages []raftpb.Message
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func number(text string) uint64 {
	value, err := strconv.ParseUint(text, 10, 64)
	check(err)
	return value
}

func open(id uint64, n *node) {
	raw, err := raft.NewRawNode(&raft.Config{
		ID:              id,
		ElectionTick:    1000, // Nobody campaigns unless told to.
		HeartbeatTick:   1,
		Storage:         n.disk,
		Applied:         n.index,
		MaxSizePerMsg:   math.MaxUint64,
		MaxInflightMsgs: 1000,
		PreVote:         prevote,
		Logger:          &raft.DefaultLogger{Logger: log.New(ioutil.Discard, "", 0)},
	})
	check(err)
	n.raw = raw
}

func begin(voters, all uint64) {
	nodes, side, messages, count = map[uint64]*node{}, map[uint64]string{}, nil, all
	var conf raftpb.ConfState
	for id := uint64(1); id <= voters; id++ {
		conf.Voters = append(conf.Voters, id)
	}
	for id := uint64(1); id <= all; id++ {
		n := &node{disk: &storage{MemoryStorage: raft.NewMemoryStorage()}}
		if id <= voters {
			var snap raftpb.Snapshot
			snap.Metadata = raftpb.SnapshotMetadata{ConfState: conf, Index: begun, Term: 1}
			check(n.disk.ApplySnapshot(snap))
			check(n.disk.SetHardState(raftpb.HardState{Term: 1, Commit: begun}))
			n.disk.conf, n.index = conf, begun
		}
		nodes[id] = n
		open(id, n)
	}
}

// Whether a change fits. The library panics, with nothing changed, where it does not.
func changed(n *node, change raftpb.ConfChangeV2) (fits bool) {
	defer func() {
		if recover() != nil {
			fits = false
		}
	}()
	n.disk.conf = *n.raw.ApplyConfChange(change)
	return true
}

func apply(n *node, entry raftpb.Entry) {
	text := string(entry.Data)
	if entry.Type == raftpb.EntryConfChangeV2 {
		var change raftpb.ConfChangeV2
		check(change.Unmarshal(entry.Data))
		text = "change " + raftpb.ConfChangesToString(change.Changes)
		if !changed(n, change) {
			text += " refused"
		}
	}
	n.index = entry.Index
	n.applied = append(n.applied, fmt.Sprintf("%d/%d %s", entry.Term, entry.Index, text))
}

func ready(n *node) {
	for n.raw.HasReady() {
		rd := n.raw.Ready()
		if !raft.IsEmptySnap(rd.Snapshot) {
			check(n.disk.ApplySnapshot(rd.Snapshot))
			n.disk.conf, n.index = rd.Snapshot.Metadata.ConfState, rd.Snapshot.Metadata.Index
			n.applied = append(n.applied, fmt.Sprintf("snapshot %d", n.index))
		}
		check(n.disk.Append(rd.Entries))
		if !raft.IsEmptyHardState(rd.HardState) {
			check(n.disk.SetHardState(rd.HardState))
		}
		messages = append(messages, rd.Messages...)
		for _, entry := range rd.CommittedEntries {
			apply(n, entry)
		}
		n.raw.Advance(rd)
	}
}

func settle() {
	for {
		for id := uint64(1); id <= count; id++ {
			ready(nodes[id])
		}
		if len(messages) == 0 {
			return
		}
		waiting := messages
		messages = nil
		for _, m := range waiting {
			if nodes[m.To] == nil {
				continue
			}
			if side[m.From] == side[m.To] {
				// A message that is not taken is lost, as it would be on the network.
				_ = nodes[m.To].raw.Step(m)
			} else if m.Type == raftpb.MsgSnap {
				nodes[m.From].raw.ReportSnapshot(m.To, raft.SnapshotFailure)
			}
		}
	}
}

func show() {
	states := map[string]state{}
	for id, n := range nodes {
		status := n.raw.BasicStatus()
		states[strconv.FormatUint(id, 10)] = state{
			status.Term, status.RaftState.String(), status.Commit, append([]string{}, n.applied...),
		}
	}
	line, err := json.Marshal(states)
	check(err)
	fmt.Println(string(line))
}

func propose(err error) {
	if err != nil && err != raft.ErrProposalDropped {
		log.Fatal(err)
	}
}

func compact(n *node) {
	first, err := n.disk.FirstIndex()
	check(err)
	// Not in a joint configuration: 3.4 lets no voter of the outgoing half restore its snapshot.
	if n.index < first || len(n.disk.conf.VotersOutgoing) > 0 {
		return
	}
	_, err = n.disk.CreateSnapshot(n.index, &n.disk.conf, nil)
	check(err)
	check(n.disk.Compact(n.index))
}

func run(words []string) {
	var n *node
	if len(words) > 1 {
		n = nodes[number(words[1])]
	}
	switch words[0] {
	case "begin":
		prevote = words[3] == "prevote"
		begin(number(words[1]), number(words[2]))
	case "campaign":
		check(n.raw.Campaign())
	case "tick":
		n.raw.Tick()
	case "propose":
		propose(n.raw.Propose([]byte(words[2])))
	case "change":
		changes, err := raftpb.ConfChangesFromString(strings.Join(words[2:], " "))
		check(err)
		change := raftpb.ConfChangeV2{Changes: changes}
		if len(changes) > 1 {
			// A joint configuration that is left by itself is proposed twice to be left by 3.4.
			change.Transition = raftpb.ConfChangeTransitionJointExplicit
		}
		propose(n.raw.ProposeConfChange(change))
	case "transfer":
		n.raw.TransferLeader(number(words[2]))
	case "restart":
		open(number(words[1]), n)
	case "compact":
		compact(n)
	case "cut":
		side = map[uint64]string{}
		for _, word := range words[1:] {
			side[number(word)] = "cut"
		}
	case "settle":
		settle()
	case "show":
		show()
	default:
		log.Fatalf("unknown command %q", words[0])
	}
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		run(strings.Fields(lines.Text()))
	}
	check(lines.Err())
}
