//! Ten thousand members. Nothing is timed here: if an event cost a pass over all members, this would take minutes.

use std::time::Duration;

use reknit_membership::holding::{Moved, Shards};
use reknit_membership::{
    Digest, Effect, Event, Generation, HistoryId, Holding, Job, JobId, JobRecord, Join, Lineage, MemberId,
    MemberName, Message, PhaseName, Plan, Rank, Resume, Shape, Sharding, Spec, Step, Timestamp, Timing,
    Transition,
};

const MEMBERS: u64 = 10_000;

struct Crowd {
    job: Job,
    saved: JobRecord,
    now: Timestamp,
    sharding: Sharding,
    history: Option<HistoryId>,
    /// What members were told in the last round.
    plans: Vec<(MemberId, Plan)>,
    went: usize,
}

impl Crowd {
    fn new(min: u32, max: u32, sharding: Sharding) -> Crowd {
        let spec = Spec { min, max, unit: 1, keep: 3 };
        let saved = JobRecord::new(JobId::new("crowd").expect("a plain name"), HistoryId(7), spec);
        let now = Timestamp(1_000_000_000);
        let job = Job::restore(saved.clone(), Timing::default(), 20_000, now);
        Crowd { job, saved, now, sharding, history: None, plans: Vec::new(), went: 0 }
    }

    fn step(&mut self, event: Event) {
        let Transition { save, then } = self.job.step(self.now, event);
        if let Some(record) = save {
            self.saved = record;
        }
        for effect in then {
            if let Effect::Tell { member, message: Message::Plan(plan) } = effect {
                self.plans.push((member, plan));
            } else if let Effect::Tell { message: Message::Go { .. }, .. } = effect {
                self.went += 1;
            }
        }
    }

    fn join(&mut self, members: std::ops::Range<u64>) {
        for id in members {
            let shape =
                Shape { tensors: Digest(1), count: 1, bytes: 1, recipe: Digest(1), sharding: self.sharding };
            let join = Join {
                name: MemberName::new(&format!("w{id}")).expect("a plain name"),
                slots: 1,
                address: format!("10.0.0.1:{id}"),
                spec: self.saved.spec,
                shape,
                history: self.history,
                generation: if self.history.is_some() { self.generation() } else { Generation(0) },
                running: matches!(self.job.phase(), PhaseName::Running),
                available: true,
            };
            self.step(Event::Attach { member: MemberId(id), join });
        }
        self.history = Some(HistoryId(7));
    }

    fn generation(&self) -> Generation {
        self.job.record().generation
    }

    fn seats(&self) -> Vec<(MemberId, Rank)> {
        let world = self.job.record().world.as_ref().expect("there is a world");
        world.seats.iter().map(|seat| (seat.member, seat.rank)).collect()
    }

    fn ready(&mut self, holding: impl Fn(MemberId, Rank) -> Holding) {
        let generation = self.generation();
        self.went = 0;
        self.plans.clear();
        for (member, rank) in self.seats() {
            self.step(Event::Ready { member, generation, holding: holding(member, rank) });
        }
    }

    fn restored(&mut self) {
        for (member, Plan { generation, attempt, resume, fetch, .. }) in std::mem::take(&mut self.plans) {
            let from = fetch[0].from[0].member;
            let moved = vec![Moved { from, bytes: 1, sent: Digest(1), got: Digest(1) }];
            self.step(Event::Restored { member, generation, attempt, resume, moved });
        }
    }

    fn check_runs(&self, ranks: usize) {
        assert_eq!(self.job.phase(), PhaseName::Running);
        assert_eq!((self.seats().len(), self.went), (ranks, ranks));
    }

    /// Some die; their neighbours' rings break, and all others' with them.
    fn die(&mut self, members: std::ops::Range<u64>) {
        let (generation, seats) = (self.generation(), self.seats());
        for id in members.clone() {
            self.step(Event::Detached { member: MemberId(id) });
        }
        let dead = |member: &MemberId| members.contains(&member.0);
        for (index, (member, rank)) in seats.iter().enumerate().filter(|(_, (member, _))| !dead(member)) {
            let suspects = vec![
                seats[(index + 1) % seats.len()].1,
                Rank((rank.0 + seats.len() as u32 - 1) % seats.len() as u32),
            ];
            self.step(Event::Broken { member: *member, generation, suspects });
        }
        self.now = self.now.after(Duration::from_millis(300));
        self.step(Event::Tick);
    }

    fn renew(&mut self) {
        let generation = self.generation();
        self.now = self.now.after(Duration::from_secs(1));
        for (member, _) in self.seats() {
            self.step(Event::Renew { member, generation, step: Step(9) });
        }
        self.step(Event::Tick);
    }
}

fn whole(lineage: u64, step: u64) -> Holding {
    Holding::State { resume: Resume { lineage: Lineage(lineage), step: Step(step) }, shards: Shards::Whole }
}

#[test]
fn ten_thousand_members_form_run_lose_some_and_run_again() {
    let mut crowd = Crowd::new(100, MEMBERS as u32, Sharding::Replicated);
    crowd.join(0..MEMBERS);
    crowd.ready(|_, _| Holding::Fresh { digest: Digest(1) });
    crowd.check_runs(MEMBERS as usize);
    (0..20).for_each(|_| crowd.renew());

    crowd.die(4_000..4_500);
    let first = crowd.saved.world.as_ref().map(|world| world.generation.0).expect("there is a world");
    crowd.ready(|member, _| whole(1, 40 + member.0 % 2));
    assert_eq!(crowd.plans.len(), 4_750, "half of them are a step behind");
    crowd.restored();
    crowd.check_runs(9_500);

    // Spares come back in the place of those that are gone, and more than there is room for.
    crowd.history = None;
    crowd.join(20_000..25_000);
    crowd.now = crowd.now.after(Duration::from_secs(3));
    crowd.step(Event::Tick);
    let generation = crowd.generation();
    for (member, _) in crowd.seats() {
        crowd.step(Event::Boundary { member, generation, holding: whole(first, 50) });
    }
    crowd.ready(
        |member, _| if member.0 < MEMBERS { whole(first, 50) } else { Holding::Fresh { digest: Digest(1) } },
    );
    assert_eq!(crowd.plans.len(), 500);
    crowd.restored();
    crowd.check_runs(MEMBERS as usize);

    // The coordinator dies; all come back, and nothing is told.
    crowd.job = Job::restore(crowd.saved.clone(), Timing::default(), 20_000, crowd.now);
    crowd.history = Some(HistoryId(7));
    let seats = crowd.seats();
    crowd.went = 0;
    for (member, _) in &seats {
        crowd.join(member.0..member.0 + 1);
    }
    assert_eq!((crowd.job.phase(), crowd.went), (PhaseName::Running, 0));
}

#[test]
fn ten_thousand_ranks_share_sixty_five_thousand_shards() {
    let count = 65_536;
    let shards =
        |rank: u64, size: u64| (rank * count / size..(rank + 1) * count / size).map(|shard| shard as u32);
    let mut crowd = Crowd::new(100, MEMBERS as u32, Sharding::Sharded { count: count as u32 });
    crowd.join(0..MEMBERS);
    crowd.ready(|_, _| Holding::Fresh { digest: Digest(1) });
    crowd.check_runs(MEMBERS as usize);
    let generation = crowd.generation();
    crowd.step(Event::Notice {
        member: MemberId(MEMBERS - 1),
        deadline: crowd.now.after(Duration::from_secs(120)),
    });
    crowd.now = crowd.now.after(Duration::from_secs(3));
    crowd.step(Event::Tick);
    let held = |member: MemberId| Holding::State {
        resume: Resume { lineage: Lineage(1), step: Step(7) },
        shards: Shards::Only(shards(member.0, MEMBERS).collect()),
    };
    for (member, _) in crowd.seats() {
        crowd.step(Event::Boundary { member, generation, holding: held(member) });
    }
    crowd.ready(|member, _| held(member));
    assert!(crowd.plans.len() > 5_000, "most have to fetch a shard from a neighbour");
    crowd.restored();
    crowd.check_runs(MEMBERS as usize - 1);
}
